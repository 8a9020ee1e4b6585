"""What one client holds of a node server's cache: slots that it writes, tickets that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmcache_core.cache import reserve_in
from lmcache_core.chunks import ChunkEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.node import protocol
from lmcache_core.node.protocol import Decided, Pending, ProtocolError, Reserved
from lmcache_core.prefetch import Prefetch
from lmcache_core.tiers.host import HostChunk

MAX_TICKETS = 65_536
"""Open at the same time in one session; a client that opens more is broken."""
MAX_OPEN_KEYS = 262_144
"""Keys of all its open tickets; what is over that finds nothing."""


@dataclass(slots=True)
class _Ticket:
    """A prefix that the client may read; ``nbytes`` of host memory are counted for it."""

    prefetch: Prefetch
    slot_bytes: int
    nbytes: int
    cut: bool


class Session:
    """Owner thread only.  Every message is checked whole before it changes anything.

    Args:
        limit_bytes: host memory that slots and tickets may hold at the same time.

    Attributes:
        held_bytes: what they hold.
        pid: of the engine, as it says.
        closing: give nothing new.
    """

    def __init__(
        self,
        ident: str,
        engine: ChunkEngine,
        layouts: Sequence[ChunkLayout],
        *,
        limit_bytes: int,
        pid: int,
    ) -> None:
        self.ident = ident
        self.pid = pid
        self.held_bytes = 0
        self.closing = False
        self._engine = engine
        self._layouts = layouts
        self._limit_bytes = limit_bytes
        self._slots: dict[int, HostChunk] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._released: list[Prefetch] = []
        self._undecided: set[int] = set()
        self._open_keys = 0
        self._tiers = {tier.name: 1 + i for i, tier in enumerate(engine.tiers.readable)}

    @property
    def slots(self) -> int:
        """Slots that are being written."""
        return len(self._slots)

    @property
    def tickets(self) -> int:
        """Tickets that are open."""
        return len(self._tickets)

    @property
    def undecided(self) -> bool:
        """Whether a ticket waits for an answer."""
        return bool(self._undecided)

    def prefetch(self, message: protocol.Prefetch) -> Decided | Pending:
        """Open a ticket.

        Raises:
            ProtocolError: its number is taken, a key comes twice, or there is no such layout.
        """
        layout = self._layout(message.layout)
        keys = protocol.split_keys(message.keys)
        distinct = set(keys)
        if message.ticket in self._tickets or len(self._tickets) >= MAX_TICKETS:
            raise ProtocolError(f"ticket {message.ticket} is open, or too many", op="prefetch")
        if len(distinct) < len(keys) or message.parent in distinct:
            raise ProtocolError("a prefix in which a key comes twice", op="prefetch")
        slot_bytes = stored_bytes(layout.payload_bytes)
        room = self._room(slot_bytes)
        cut = len(keys) > room
        found = self._engine.prefetch_keys(
            keys[:room] if cut else keys,
            layout=layout,
            parent=message.parent,
            deadline_s=self._engine.now_s() + message.deadline_s,
        )
        ticket = _Ticket(found, slot_bytes, len(found.keys) * slot_bytes, cut)
        self._tickets[message.ticket] = ticket
        self._open_keys += len(found.keys)
        self.held_bytes += ticket.nbytes
        if found.done:
            return self._decide(message.ticket, ticket)
        self._undecided.add(message.ticket)
        return Pending(message.ticket)

    def decided(self) -> Iterator[Decided]:
        """An answer for each ticket that became final since the last call."""
        for number in [n for n in self._undecided if self._tickets[n].prefetch.done]:
            self._undecided.discard(number)
            yield self._decide(number, self._tickets[number])

    def release(self, message: protocol.Release) -> None:
        """End a ticket; its chunks are unpinned by the next `tidy`.

        Raises:
            ProtocolError: no such ticket.
        """
        ticket = self._tickets.pop(message.ticket, None)
        if ticket is None:
            raise ProtocolError(f"ticket {message.ticket} is not open", op="release")
        self._undecided.discard(message.ticket)
        self._end(ticket)

    def tidy(self) -> None:
        """Unpin what was released: work that no answer has to wait for."""
        for prefetch in self._released:
            self._engine.release(prefetch)
        self._released.clear()

    def reserve(self, message: protocol.Reserve) -> Reserved:
        """Slots to write.

        Raises:
            ProtocolError: too many, a chunk before itself, or no such layout.
        """
        runs = [(protocol.split_keys(r.keys), r, self._layout(r.layout)) for r in message.runs]
        if sum(len(keys) for keys, _, _ in runs) > protocol.MAX_WANTED:
            raise ProtocolError("too many slots at once", op="reserve")
        if any(p == k for keys, run, _ in runs for p, k in zip([run.parent, *keys], keys)):
            raise ProtocolError("a chunk that comes before itself", op="reserve")
        self.tidy()
        answers: list[int] = []
        for keys, run, layout in runs:
            self._reserve(keys, run, layout, answers)
        return Reserved(message.seq, protocol.pack_offsets(answers))

    def commit(self, message: protocol.Commit) -> None:
        """The payloads are written.

        Raises:
            ProtocolError: not slots of this session.
        """
        self._engine.commit(self._take(message.offsets))

    def abort(self, message: protocol.Abort) -> None:
        """The payloads will not be written.

        Raises:
            ProtocolError: not slots of this session.
        """
        self._engine.abort(self._take(message.offsets))

    def touch(self, message: protocol.Touch) -> None:
        """A prefix was used."""
        self._engine.host.touch(protocol.split_keys(message.keys))

    def forget(self, message: protocol.Forget) -> None:
        """Drop keys from the host tier."""
        self._engine.host.drop(protocol.split_keys(message.keys))

    def end(self) -> tuple[int, int]:
        """Nobody can touch its memory any more: free it all.  Returns slots and tickets."""
        left = len(self._slots), len(self._tickets)
        self._engine.abort(self._slots.values())
        for ticket in self._tickets.values():
            self._end(ticket)
        self.tidy()
        self._slots.clear()
        self._tickets.clear()
        self._undecided.clear()
        self.held_bytes = 0
        return left

    def _layout(self, index: int) -> ChunkLayout:
        if index >= len(self._layouts):
            raise ProtocolError(f"layout {index} of {len(self._layouts)}", op="node")
        return self._layouts[index]

    def _decide(self, number: int, ticket: _Ticket) -> Decided:
        found = ticket.prefetch
        hits = found.hits()
        count, reason = len(hits), ""
        if count < len(found.keys):
            reason = self._engine.why_missed(found, count)
        elif ticket.cut:
            self._count_refused()
            reason = "no_room"
        # From here on only what it holds counts, and what may yet come.
        pinned = count
        if found.asking:
            pinned = len(found.keys)
        elif count < len(found.keys):
            pinned = sum(chunk is not None for chunk in found.chunks) + len(found.pending)
        self.held_bytes += pinned * ticket.slot_bytes - ticket.nbytes
        ticket.nbytes = pinned * ticket.slot_bytes
        sources = b""
        if found.sources:
            tiers, names = self._tiers, found.sources
            sources = bytes(tiers.get(names.get(chunk.key, ""), 0) for chunk in hits)
        offsets = protocol.pack_offsets([chunk.offset for chunk in hits])
        return Decided(number, offsets, sources, reason)

    def _room(self, slot_bytes: int) -> int:
        """How many chunks a new ticket may ask for."""
        if self.closing:
            return 0
        room = max(0, self._limit_bytes - self.held_bytes) // slot_bytes
        return min(room, MAX_OPEN_KEYS - self._open_keys)

    def _end(self, ticket: _Ticket) -> None:
        self._open_keys -= len(ticket.prefetch.keys)
        self.held_bytes -= ticket.nbytes
        self._released.append(ticket.prefetch)

    def _reserve(
        self, keys: Sequence[bytes], run: protocol.Run, layout: ChunkLayout, answers: list[int]
    ) -> None:
        nbytes = stored_bytes(layout.payload_bytes)
        for parent, key in zip([run.parent, *keys], keys):
            if self.closing or self.held_bytes + nbytes > self._limit_bytes:
                self._count_refused()
                answers.append(protocol.NO_SLOT["no_room"])
                continue
            found = reserve_in(self._engine, key, parent, layout, blank=run.blank)
            if isinstance(found, HostChunk):
                self._slots[found.offset] = found
                self.held_bytes += nbytes
                answers.append(found.offset)
            else:
                answers.append(protocol.NO_SLOT[found.value])

    def _count_refused(self) -> None:
        event = "node.while_closing" if self.closing else "node.over_bound"
        self._engine.metrics.counter(event).inc()

    def _take(self, packed: bytes) -> list[HostChunk]:
        offsets = protocol.unpack_offsets(packed)
        if len(set(offsets)) < len(offsets) or not all(o in self._slots for o in offsets):
            raise ProtocolError("slots that this session does not write", op="node")
        chunks = [self._slots.pop(offset) for offset in offsets]
        self.held_bytes -= sum(stored_bytes(chunk.payload_bytes) for chunk in chunks)
        return chunks
