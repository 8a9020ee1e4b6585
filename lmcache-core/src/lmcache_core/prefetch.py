"""Prefixes on their way to the host tier, beside the engine.

Every lower tier is asked at once; what the first answers allow starts to move at once, and a
chunk that one tier fails to give is taken from the next.  A slow or dead tier delays only a
prefix that nobody else has, and at most until the deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache_core.layout import ChunkLayout
from lmcache_core.metrics import Metrics
from lmcache_core.planner import plan
from lmcache_core.sdk import Status
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.tiers.stack import TierStack

_REASON_OF = {
    Status.MISS: "evicted",
    Status.CORRUPT: "corrupt",
    Status.SIZE_MISMATCH: "corrupt",
    Status.TIMED_OUT: "deadline",
    Status.ABANDONED: "deadline",
}
_OWN_REASONS = {"codec"}
"""Reasons of a tier that say more than its status."""


class Prefetch:
    """A prefix on its way to the host tier.

    ``done`` turns True when the prefix is decided: everything arrived, no tier has the next
    chunk, or the deadline passed.  Until `Prefetcher.release` its chunks stay pinned.

    Attributes:
        keys: of the prefix, in order; ``chunks`` has the pinned chunk of each, or None.
        layout: of every one of them.
        parent: key of the chunk before the first, if any.
        first: index of the first chunk that host did not have; ``rows`` start there, one a
            tier, None until it answers.
        pending: indices whose fetch has not settled.
        asking: tiers whose answer matters have not given it.
        stop: chunks from this index on will not come.
        sources: key -> name of the tier that it was fetched from for this ticket.
        reasons: why the chunk of an index did not come.
        unasked: why a tier could not say what it has.
        closed: released.
    """

    __slots__ = (
        "_now_s",
        "asking",
        "chunks",
        "closed",
        "deadline_s",
        "first",
        "keys",
        "layout",
        "parent",
        "pending",
        "reasons",
        "rows",
        "sources",
        "stop",
        "unasked",
    )

    def __init__(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        *,
        layout: ChunkLayout,
        deadline_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._now_s = now_s
        self.keys = list(keys)
        self.parent = parent
        self.layout = layout
        self.deadline_s = deadline_s
        self.chunks: list[HostChunk | None] = [None] * len(keys)
        self.first = 0
        self.rows: list[list[bool] | None] = []
        self.pending: set[int] = set()
        self.asking = False
        self.stop = len(keys)
        self.sources: dict[bytes, str] = {}
        self.reasons: dict[int, str] = {}
        self.unasked: str = ""
        self.closed = False

    @property
    def done(self) -> bool:
        """Whether `hits` is final.  Never blocks."""
        if not (self.asking or self.pending):
            return True
        return self._now_s() >= self.deadline_s

    def hits(self, start: int = 0) -> list[HostChunk]:
        """The chunks from ``start`` on that are in host now without a gap, pinned."""
        found: list[HostChunk] = []
        for chunk in self.chunks[start : self.stop]:
            if chunk is None:
                break
            found.append(chunk)
        return found

    def why_missed(self, index: int) -> str:
        """Why chunk ``index`` is not here; "" when no tier has it and each could say so."""
        if index in self.reasons:
            return self.reasons[index]
        if self.asking or index in self.pending:
            return "deadline"
        return self.unasked


@dataclass(slots=True)
class _Arrival:
    """One chunk that is being fetched, and who waits for it."""

    tier: RemoteTier
    waiting: list[tuple[Prefetch, int]]


class Prefetcher:
    """Moves prefixes from lower tiers to host.  Owner thread only.

    Args:
        lose: takes a chunk whose slot native code may still touch.
    """

    def __init__(
        self,
        host: HostTier,
        tiers: TierStack,
        *,
        metrics: Metrics,
        now_s: Callable[[], float],
        lose: Callable[[HostChunk, RemoteTier], None],
    ) -> None:
        self._host = host
        self._tiers = tiers
        self._metrics = metrics
        self._now_s = now_s
        self._lose = lose
        self._arriving: dict[bytes, _Arrival] = {}

    def __contains__(self, key: bytes) -> bool:
        """Whether ``key`` is on its way."""
        return key in self._arriving

    def start(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        *,
        layout: ChunkLayout,
        deadline_s: float,
    ) -> Prefetch:
        """Start moving ``keys``, a prefix or the rest of one after ``parent``."""
        ticket = Prefetch(keys, parent, layout=layout, deadline_s=deadline_s, now_s=self._now_s)
        ticket.first = self._host.prefix(keys)
        for index in range(ticket.first):
            self._join(ticket, index)
        missing = ticket.keys[ticket.first :]
        if missing and self._tiers.readable:
            ticket.asking = True
            ticket.rows = [None] * len(self._tiers.readable)

            def answered(position: int, present: list[bool], why: str) -> None:
                ticket.rows[position] = present
                ticket.unasked = ticket.unasked or why
                self._advance(ticket)

            self._tiers.residency(missing, answered)
        return ticket

    def release(self, ticket: Prefetch) -> None:
        """End the ticket: unpin its chunks; fetches that nobody else wants and that have not
        started will not run."""
        if ticket.closed:
            return
        ticket.closed = True
        self._host.touch(ticket.keys)
        for chunk in ticket.chunks:
            if chunk is not None:
                self._host.unpin(chunk)
        ticket.chunks = [None] * len(ticket.keys)
        self._forget_from(ticket, 0)

    def _advance(self, ticket: Prefetch) -> None:
        """Start what the answers so far allow."""
        if ticket.closed:
            return
        resident = [self._host.get(key) is not None for key in ticket.keys[ticket.first :]]
        chosen, decided = plan([resident, *ticket.rows])
        end = ticket.first + len(chosen)
        for index, tier in enumerate(chosen, ticket.first):
            if index >= ticket.stop:
                break
            if ticket.chunks[index] is None and index not in ticket.pending:
                self._want(ticket, index, tier)
        ticket.asking = not decided and end < ticket.stop
        if decided and end < ticket.stop:
            ticket.stop = end
        self._forget_from(ticket, ticket.stop)

    def _want(self, ticket: Prefetch, index: int, tier: int) -> None:
        key = ticket.keys[index]
        if self._host.get(key) is not None:
            self._join(ticket, index)
            return
        arrival = self._arriving.get(key)
        if arrival is None:
            parent = ticket.keys[index - 1] if index else ticket.parent
            chunk = self._host.reserve(key, parent, ticket.layout)
            if chunk is None:
                self._metrics.counter("host.prefetch_no_room").inc()
                ticket.reasons[index] = "no_room"
                ticket.stop = index
                return
            arrival = _Arrival(self._tiers.readable[tier - 1], [(ticket, index)])
            self._arriving[key] = arrival
            ticket.pending.add(index)
            self._fetch(chunk, arrival)
            return
        arrival.waiting.append((ticket, index))
        ticket.pending.add(index)

    def _fetch(self, chunk: HostChunk, arrival: _Arrival) -> None:
        def settled(status: Status | None, why: str) -> None:
            del self._arriving[chunk.key]
            if status is Status.ABANDONED:
                self._lose(chunk, arrival.tier)
            elif status is Status.OK:
                self._host.seal(chunk)
            else:
                self._host.abort(chunk)
            for ticket, index in list(arrival.waiting):
                self._arrived(ticket, index, status, arrival.tier, why)

        arrival.tier.fetch(chunk, settled, wanted=lambda: bool(arrival.waiting))

    def _arrived(
        self, ticket: Prefetch, index: int, status: Status | None, tier: RemoteTier, why: str
    ) -> None:
        ticket.pending.discard(index)
        self._join(ticket, index)
        if ticket.chunks[index] is not None:
            ticket.sources[ticket.keys[index]] = tier.name
            return
        if status is not None:
            # None when the ticket joined another's fetch before the tier has answered it.
            row = ticket.rows[self._tiers.readable.index(tier)]
            if row is not None:
                row[index - ticket.first] = False
            known = _REASON_OF.get(status, "failed")
            ticket.reasons[index] = why if why in _OWN_REASONS else known
        # From the next tier that has it; otherwise the prefix ends here.
        self._advance(ticket)

    def _join(self, ticket: Prefetch, index: int) -> None:
        chunk = self._host.get(ticket.keys[index])
        if chunk is not None and chunk.layout.fingerprint != ticket.layout.fingerprint:
            # Only an engine that derives its keys wrongly can have stored this.
            ticket.reasons[index] = "layout"
            return
        if chunk is not None and ticket.chunks[index] is None:
            self._host.pin(chunk)
            ticket.chunks[index] = chunk

    def _forget_from(self, ticket: Prefetch, start: int) -> None:
        for index in [i for i in ticket.pending if i >= start]:
            ticket.pending.discard(index)
            self._arriving[ticket.keys[index]].waiting.remove((ticket, index))
