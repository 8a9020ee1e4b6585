"""`NodeCache`: a node server's cache as a `lmcache_core.cache.Cache`.

A server that is gone or frozen costs one short time-out; then everything misses at once until
a background thread has reached one again.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager

from lmcache_core.cache import OnResidency, Refusal, Slot, Ticket, Wanted
from lmcache_core.config import EngineConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import EventLog, logger
from lmcache_core.metrics import Metrics
from lmcache_core.node import protocol
from lmcache_core.node.address import Address
from lmcache_core.node.attach import NodeArena
from lmcache_core.node.held import Held, NodeSlot, NodeTicket, by_holder, runs_of
from lmcache_core.node.link import Link, greet
from lmcache_core.sdk import LMCacheError

_ANSWER_SHARE = 0.9
"""Of a ticket's deadline; the rest is for the answer's way."""
_MIN_DEADLINE_S = 0.001
_PAUSE_S = 0.01
_REFUSALS = {protocol.NO_SLOT[refusal.value]: refusal for refusal in Refusal}
NODE_DOWN = "node_down"


def connect(config: EngineConfig, layouts: Sequence[ChunkLayout]) -> NodeCache:
    """A session of the node server at ``config.node``.

    Raises:
        ConfigError: a wrong address, or the server refuses this client.
        BackendUnavailable: no server answers within ``node_connect_timeout_s``.
    """
    return NodeCache(config, layouts)


class NodeCache:
    """See `lmcache_core.cache.Cache`.  Owner thread only.

    Its slots and tickets stay valid when the server goes: their memory stays mapped, and their
    session ends only after the last of them.  Until then another server is not gone over to, so
    that an offset never meets the memory of another.
    """

    def __init__(self, config: EngineConfig, layouts: Sequence[ChunkLayout]) -> None:
        self.config = config
        self.metrics = Metrics()
        self.layouts = tuple(layouts)
        self.owner: AbstractContextManager[object] = threading.RLock()
        self._address = Address.parse(config.node)
        self._log = EventLog()
        self._numbers = 0
        self._old: list[Held] = []
        self._forgotten: dict[bytes, None] = {}
        self._fresh: Link | None = None
        self._arrived = threading.Event()
        self._closed = threading.Event()
        self._current: Held | None = None
        self._adopt(self._greet(config.node_connect_timeout_s))
        self.metrics.gauge("node.connected", lambda: float(self._current is not None))

    @property
    def handle(self) -> NodeArena:
        """The arena of every slot and hit that is in use, and of those given from now on."""
        return self._handle

    @property
    def connected(self) -> bool:
        """Whether a server is there, as far as is known."""
        return self._current is not None

    @property
    def settling(self) -> bool:
        """Whether something waits to be sent; the server itself finishes what was stored."""
        return any(held.link.unsent for held in self._holders())

    def now_s(self) -> float:
        """The clock of deadlines, in seconds."""
        return time.monotonic()

    def poll(self) -> None:
        """Bring in what has come, send what is to be sent."""
        if self._fresh is not None and self._may_adopt:
            link, self._fresh = self._fresh, None
            self._arrived.clear()
            self._adopt(link)
            self.metrics.counter("node.reconnected").inc()
            logger.info("node_reconnected address=%s", self._address)
        # The old ones first: what was said there was said before.
        for held in list(self._old):
            self._bring_in(held)
            held.link.flush()
            if held.idle:
                held.link.close()
                self._old.remove(held)
        if self._current is not None:
            self._current.link.flush()
            self._bring_in(self._current)

    def wait(self, timeout_s: float) -> None:
        """Return when something has come, at the latest after ``timeout_s``."""
        if self._current is not None:
            self._current.link.wait(timeout_s)
        elif self._fresh is None:
            self._arrived.wait(timeout_s)
        elif not self._may_adopt:
            time.sleep(min(timeout_s, _PAUSE_S))

    def prefetch(
        self,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        layout: int = 0,
        deadline_s: float | None = None,
    ) -> NodeTicket:
        """See `lmcache_core.cache.Cache.prefetch`; sent at once."""
        now_s = time.monotonic()
        until_s = now_s + self.config.lookup_deadline_s if deadline_s is None else deadline_s
        held = self._current
        ticket = NodeTicket(keys, self._number(), held, until_s)
        if held is None:
            ticket.end(NODE_DOWN)
            return ticket
        wanted = keys if len(keys) <= protocol.MAX_KEYS else keys[: protocol.MAX_KEYS]
        limit_s = min((until_s - now_s) * _ANSWER_SHARE, protocol.MAX_DEADLINE_S)
        held.tickets[ticket.number] = ticket
        held.unseen[ticket.number] = now_s
        held.link.say(
            protocol.Prefetch(
                ticket.number, layout, b"".join(wanted), parent, max(limit_s, _MIN_DEADLINE_S)
            )
        )
        held.link.flush()
        return ticket

    def why_missed(self, ticket: Ticket, index: int) -> str:
        """Why chunk ``index`` of ``ticket`` did not come; "" when nobody knows it."""
        assert isinstance(ticket, NodeTicket)
        if not ticket.decided:
            return "deadline"
        return ticket.reason

    def eviction(self, key: bytes) -> None:
        """Not known here."""
        return None

    @property
    def incarnation(self) -> str:
        """Of the server that is there; "" when there is none."""
        current = self._current
        return current.link.welcome.incarnation if current is not None else ""

    def release(self, ticket: Ticket) -> None:
        """End the ticket: unpin its chunks, want no more of them.  Idempotent."""
        assert isinstance(ticket, NodeTicket)
        held = ticket.held
        if held is not None and not ticket.released:
            del held.tickets[ticket.number]
            held.link.say(protocol.Release(ticket.number))
        ticket.forget()

    def reserve(self, wanted: Sequence[Wanted]) -> list[Slot | Refusal]:
        """See `lmcache_core.cache.Cache.reserve`; waits for at most ``node_reply_timeout_s``."""
        held = self._current
        found: list[Slot | Refusal] = []
        if held is not None and wanted:
            seq = self._number()
            for start in range(0, len(wanted), protocol.MAX_WANTED):
                part = wanted[start : start + protocol.MAX_WANTED]
                held.link.say(protocol.Reserve(seq, runs_of(part)))
                held.unanswered += 1
            held.link.flush()
            until_s = time.monotonic() + self.config.node_reply_timeout_s
            packed: array[int] = array("Q")
            while self._current is held and len(packed) < len(wanted):
                packed += self._bring_in(held, seq)
                left_s = until_s - time.monotonic()
                if len(packed) < len(wanted) and left_s <= 0:
                    self._lose(held, "no reply")
                elif len(packed) < len(wanted) and self._current is held:
                    held.link.wait(left_s)
            found += [self._slot(held, one.key, o) for one, o in zip(wanted, packed)]
        missing = len(wanted) - len(found)
        if missing:
            self.metrics.counter("node.store_dropped").inc(missing)
        return found + [Refusal.NO_ROOM] * missing

    def commit(self, slots: Sequence[Slot]) -> None:
        """See `lmcache_core.cache.Cache.commit`."""
        for held, own in by_holder(slots):
            good = [slot.offset for slot in own if not slot.doomed]
            doomed = [slot.offset for slot in own if slot.doomed]
            if good:
                held.link.say(protocol.Commit(protocol.pack_offsets(good)))
            if doomed:
                held.link.say(protocol.Abort(protocol.pack_offsets(doomed)))

    def abort(self, slots: Sequence[Slot]) -> None:
        """See `lmcache_core.cache.Cache.abort`."""
        for held, own in by_holder(slots):
            offsets = protocol.pack_offsets(slot.offset for slot in own)
            held.link.say(protocol.Abort(offsets))

    def touch(self, keys: Sequence[bytes]) -> None:
        """The prefix ``keys`` was used."""
        if self._current is not None and keys:
            self._current.link.say(protocol.Touch(b"".join(keys[: protocol.MAX_KEYS])))

    def forget(self, keys: Sequence[bytes]) -> None:
        """Drop ``keys`` from the server's host tier, for everybody."""
        gone = set(keys)
        for held in self._holders():
            for slot in held.slots.values():
                slot.doomed = slot.doomed or slot.key in gone
        if self._current is None:
            # Told to the next one: it may be the same, which was only frozen.
            self._forgotten.update(dict.fromkeys(keys))
            while len(self._forgotten) > protocol.MAX_KEYS:
                del self._forgotten[next(iter(self._forgotten))]
            return
        for start in range(0, len(keys), protocol.MAX_KEYS):
            part = keys[start : start + protocol.MAX_KEYS]
            self._current.link.say(protocol.Forget(b"".join(part)))

    def reset(self) -> None:
        """Slots that are being written are freed at their end.  What is stored stays, for the
        others: the engine goes on under another namespace."""
        for held in self._holders():
            for slot in held.slots.values():
                slot.doomed = True

    def on_residency(self, changed: OnResidency) -> None:
        """Nothing is told: events come from embedded caches only."""
        logger.warning("KV cache events are not told by a node server")

    def close(self) -> bool:
        """Send what waits, for at most ``node_reply_timeout_s``, and end."""
        self._closed.set()
        until_s = time.monotonic() + self.config.node_reply_timeout_s
        while self.settling and time.monotonic() < until_s:
            self.poll()
            time.sleep(0.001)
        sent = not self.settling
        for held in self._holders():
            held.link.close()
        if self._fresh is not None:
            self._fresh.close()
        self._old, self._current, self._fresh = [], None, None
        return sent

    @property
    def _may_adopt(self) -> bool:
        return self._current is None and not any(held.in_use for held in self._old)

    def _holders(self) -> list[Held]:
        return [*self._old, self._current] if self._current is not None else self._old

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _slot(self, held: Held, key: bytes, offset: int) -> Slot | Refusal:
        refusal = _REFUSALS.get(offset)
        if refusal is not None:
            return refusal
        slot = held.slots[offset] = NodeSlot(key, offset, held)
        return slot

    def _bring_in(self, held: Held, seq: int = 0) -> array[int]:
        """Take what came; the answers to the reservation ``seq``."""
        found: array[int] = array("Q")
        for message in held.link.read():
            if isinstance(message, protocol.Reserved):
                held.unanswered -= 1
                offsets = protocol.unpack_offsets(message.answers)
                if message.seq == seq:
                    found += offsets
                    continue
                # Given too late: whoever asked was told that there is no room.
                late = [offset for offset in offsets if offset not in _REFUSALS]
                held.link.say(protocol.Abort(protocol.pack_offsets(late)))
            elif isinstance(message, (protocol.Decided, protocol.Pending)):
                held.unseen.pop(message.ticket, None)
                ticket = held.tickets.get(message.ticket)
                if ticket is not None and isinstance(message, protocol.Decided):
                    ticket.settle(message, held.link.welcome.tiers)
        if held.link.broken:
            self._lose(held, "it closed the connection")
        elif held.is_silent(time.monotonic(), self.config.node_reply_timeout_s):
            self._lose(held, "no reply")
        return found

    def _lose(self, held: Held, why: str) -> None:
        """Go on without ``held``, whose memory may still be in use."""
        if self._current is not held:
            return
        self._current = None
        self._old.append(held)
        for ticket in held.tickets.values():
            if not ticket.decided:
                ticket.end(NODE_DOWN)
        self.metrics.counter("node.lost").inc()
        self._log.warn("node_lost", address=self._address, reason=why)
        threading.Thread(target=self._reconnect, name="lmc-node", daemon=True).start()

    def _adopt(self, link: Link) -> None:
        self._current = Held(link)
        self.capacity_bytes = link.welcome.capacity_bytes
        self._handle = NodeArena(
            self._address,
            self.config.node_token_file,
            link.welcome.session,
            link.welcome.incarnation,
            self.config.node_connect_timeout_s,
        )
        forgotten, self._forgotten = list(self._forgotten), {}
        self.forget(forgotten)

    def _greet(self, timeout_s: float) -> Link:
        return greet(
            self._address,
            role="engine",
            layouts=self.layouts,
            token_file=self.config.node_token_file,
            timeout_s=timeout_s,
        )

    def _reconnect(self) -> None:
        """In a thread of its own, until there is a link or the cache is closed."""
        while not self._closed.wait(self.config.node_retry_s):
            try:
                link = self._greet(self.config.node_connect_timeout_s)
            except LMCacheError as error:
                self.metrics.counter("node.connect_failed").inc()
                self._log.warn("node_unreachable", reason=error.message)
                continue
            self._fresh = link
            self._arrived.set()
            if self._closed.is_set():
                link.close()
            return
