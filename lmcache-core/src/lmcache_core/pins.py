"""Chunks that stay: pins with a name, an owner elsewhere, and an end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_core.chunks import ChunkEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.prefetch import Prefetch
from lmcache_core.sdk import ConfigError
from lmcache_core.tiers.host import ChunkState, HostChunk
from lmcache_core.tiers.remote import RemoteTier

MAX_PINS = 10_000
MAX_AT_ONCE = 4
"""Pins whose chunks are on their way to host."""


@dataclass(frozen=True, slots=True)
class Run:
    """Keys of one layout; each is the parent of the next when ``chained``."""

    keys: Sequence[bytes]
    layout: ChunkLayout
    chained: bool = True


@dataclass(slots=True)
class Pinned:
    """One pin.

    Attributes:
        tier: its name; None is host.
        until_s: on the engine's clock.
        held: keys that are kept, in order.
        missing: reason -> chunks that are not.
        done: everything is decided.
        nbytes: of host memory that it keeps.
    """

    name: str
    tier: RemoteTier | None
    until_s: float
    held: dict[bytes, None] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    done: bool = False
    nbytes: int = 0
    chunks: dict[bytes, HostChunk] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    tickets: list[Prefetch] = field(default_factory=list)


class Pins:
    """A part of an engine (see `lmcache_core.chunks.Part`): owner thread only.

    Args:
        max_bytes: host memory that pins may keep; what would go over it stays unpinned.
    """

    busy = False

    def __init__(self, engine: ChunkEngine, *, max_bytes: int) -> None:
        self._engine = engine
        self._max_bytes = max_bytes
        self._pins: dict[str, Pinned] = {}
        self._by_key: dict[bytes, int] = {}
        self._gone: list[bytes] = []
        self.host_bytes = 0
        engine.on_residency(self._changed)
        engine.metrics.gauge("host.pinned_bytes", lambda: self.host_bytes)

    def __contains__(self, name: str) -> bool:
        return name in self._pins

    @property
    def any(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._pins or self._gone)

    def lasts(self, one: Pinned) -> bool:
        """Whether ``one`` has not ended, and no other has taken its name."""
        return self._pins.get(one.name) is one

    def pin(self, name: str, runs: Sequence[Run], *, tier: str, until_s: float) -> Pinned:
        """Keep the chunks of ``runs`` in ``tier``; another pin of this name ends.

        For ``host`` what is not there is fetched from the tiers below, `Pinned.done` says when that
        is over.  In another tier a key need not be there yet.

        Raises:
            ConfigError: no such tier, or `MAX_PINS` are there.
        """
        below = {each.name: each for each in self._engine.tiers.readable}
        if tier != "host" and tier not in below:
            raise ConfigError(f"no tier is named {tier!r}", hint=f"host, {', '.join(below)}")
        self.unpin(name)
        if len(self._pins) >= MAX_PINS:
            raise ConfigError(f"there are {MAX_PINS} pins", hint="end some, or give them a TTL")
        one = Pinned(name, below.get(tier), until_s)
        self._pins[name] = one
        if one.tier is None:
            one.runs = list(runs)
            self._start_waiting()
            return one
        one.held = dict.fromkeys(itertools.chain.from_iterable(run.keys for run in runs))
        for key in one.held:
            one.tier.pin(key)
            if not one.tier.has(key):
                one.missing["absent"] = one.missing.get("absent", 0) + 1
        one.done = True
        return one

    def hold(self, name: str, chunk: HostChunk, *, until_s: float) -> bool:
        """Also keep ``chunk``, which is in host, under ``name``; False when there is no room."""
        one = self._pins.get(name)
        if one is None:
            one = self._pins[name] = Pinned(name, None, until_s, done=True)
        return self._hold(one, chunk)

    def unpin(self, name: str) -> bool:
        """End a pin; False when there is none of this name."""
        one = self._pins.pop(name, None)
        if one is None:
            return False
        for ticket in one.tickets:
            self._engine.release(ticket)
        if one.tier is not None:
            for key in one.held:
                one.tier.unpin(key)
        for chunk in list(one.chunks.values()):
            self._let_go(one, chunk)
        return True

    def end_of(self, meant: Callable[[bytes], bool], tiers: Sequence[str]) -> None:
        """Pins end for the chunks that are ``meant``, in ``tiers``; none named means all."""
        for one in self._pins.values():
            if tiers and (one.tier.name if one.tier else "host") not in tiers:
                continue
            for key in [key for key in one.held if meant(key)]:
                del one.held[key]
                if one.tier is not None:
                    one.tier.unpin(key)
                elif key in one.chunks:
                    self._let_go(one, one.chunks[key])

    def tick(self) -> None:
        """End what is over; bring in what has come to host."""
        now_s = self._engine.now_s()
        if self._gone:
            gone, self._gone = self._gone, []
            self._let_go_of(gone)
        for one in [one for one in self._pins.values() if one.until_s <= now_s]:
            self._engine.metrics.counter("pins.expired").inc()
            self.unpin(one.name)
        for one in self._pins.values():
            if one.tickets and all(ticket.done for ticket in one.tickets):
                self._arrived(one)
        self._start_waiting()

    def close(self) -> bool:
        """End all."""
        for name in list(self._pins):
            self.unpin(name)
        return True

    def _start_waiting(self) -> None:
        active = sum(bool(one.tickets) for one in self._pins.values())
        for one in self._pins.values():
            if active >= MAX_AT_ONCE:
                return
            if not one.runs or one.tickets:
                continue
            active += 1
            for run in one.runs:
                one.tickets += self._fetch(run)
            one.runs = []

    def _fetch(self, run: Run) -> list[Prefetch]:
        prefetch, deadline_s = self._engine.prefetch_keys, self._deadline_s()
        if run.chained:
            return [prefetch(run.keys, layout=run.layout, deadline_s=deadline_s)]
        return [prefetch([key], layout=run.layout, deadline_s=deadline_s) for key in run.keys]

    def _deadline_s(self) -> float:
        return self._engine.now_s() + self._engine.config.lookup_deadline_s

    def _arrived(self, one: Pinned) -> None:
        for ticket in one.tickets:
            hits = ticket.hits()
            for chunk in hits:
                if not self._hold(one, chunk):
                    one.missing["no_room"] = one.missing.get("no_room", 0) + 1
            missing = len(ticket.keys) - len(hits)
            if missing:
                why = self._engine.why_missed(ticket, len(hits)) or "absent"
                one.missing[why] = one.missing.get(why, 0) + missing
            self._engine.release(ticket)
        one.tickets = []
        one.done = True

    def _hold(self, one: Pinned, chunk: HostChunk) -> bool:
        if chunk.key in one.chunks:
            return True
        nbytes = stored_bytes(chunk.payload_bytes)
        first = chunk.key not in self._by_key
        if chunk.state is not ChunkState.SEALED or (
            first and self.host_bytes + nbytes > self._max_bytes
        ):
            return False
        self._engine.host.pin(chunk)
        one.chunks[chunk.key] = chunk
        one.held[chunk.key] = None
        one.nbytes += nbytes
        self._by_key[chunk.key] = self._by_key.get(chunk.key, 0) + 1
        if first:
            self.host_bytes += nbytes
        return True

    def _let_go(self, one: Pinned, chunk: HostChunk) -> None:
        nbytes = stored_bytes(chunk.payload_bytes)
        del one.chunks[chunk.key]
        one.nbytes -= nbytes
        left = self._by_key[chunk.key] - 1
        if left:
            self._by_key[chunk.key] = left
        else:
            del self._by_key[chunk.key]
            self.host_bytes -= nbytes
        self._engine.host.unpin(chunk)

    def _changed(self, tier: str, key: bytes, present: bool) -> None:
        """Called in the midst of a drop: what is pinned is let go of in the next `tick`."""
        if tier == "host" and not present and key in self._by_key:
            self._gone.append(key)

    def _let_go_of(self, keys: Sequence[bytes]) -> None:
        for one in self._pins.values():
            for key in keys:
                chunk = one.chunks.get(key)
                if chunk is not None and chunk.doomed:
                    del one.held[key]
                    self._let_go(one, chunk)
