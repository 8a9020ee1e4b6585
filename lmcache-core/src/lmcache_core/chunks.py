"""`ChunkEngine`: chunks by their keys, over all tiers; the only part that moves them.

One thread owns an engine: it calls every method, and `poll` brings in what other threads
have finished.  Nothing here waits for I/O, except `flush` and `close`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from lmcache_core.config import EngineConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.misses import EvictedKeys, Eviction
from lmcache_core.prefetch import Prefetch, Prefetcher
from lmcache_core.recode import Recode
from lmcache_core.sdk import BackendClosed, ConfigError, Status
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.tiers.stack import TierStack
from lmcache_core.transfer.executor import Runtime
from lmcache_core.writeback import WriteBack

MAX_EARLY = 1024
"""Buffers that were released before their call's answer came; more would stay out of use."""


class Part(Protocol):
    """What lives with an engine and is polled with it."""

    @property
    def busy(self) -> bool:
        """Whether the owner must go on polling."""
        ...

    def tick(self) -> None:
        """Look at deadlines."""
        ...

    def close(self) -> bool:
        """End; False when something still runs."""
        ...


class ChunkEngine:
    """prefetch / reserve / commit / abort / drop / close by stored keys, of any layout.

    Args:
        config: frozen settings.
        arena: host memory; the engine closes it.
        open_tiers: makes the tiers below host.
        runtime: clock, threads and waiting; a simulation gives its own.

    Attributes:
        evicted: chunks that left a tier lately.
        unstored: writes to lower tiers that failed, so far.
        parts: closed with the engine, before its tiers.
        owner: who calls the engine's methods may hold it, where more than one thread takes turns.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        arena: Arena,
        open_tiers: Callable[[HostTier], Sequence[RemoteTier]] = lambda host: (),
        runtime: Runtime | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self.runtime = runtime or Runtime()
        self.evicted = EvictedKeys()
        self._watchers: list[Callable[[str, bytes, bool], None]] = []
        self.host = HostTier(arena, self._evicted)
        self.tiers = TierStack(open_tiers(self.host))
        self._prefetcher = Prefetcher(
            self.host,
            self.tiers,
            metrics=self.metrics,
            now_s=self.runtime.now_s,
            lose=self._lose,
        )
        self._lost: dict[int, HostChunk] = {}
        self._lent: dict[int, list[HostChunk]] = {}
        self._released_early: deque[int] = deque(maxlen=MAX_EARLY)
        self._demoting = 0
        self._demoting_bytes = 0
        self._write_back: WriteBack | None = None
        if self.tiers.on_evict:
            ahead_bytes = config.write_ahead_bytes or self.host.capacity_bytes // 8
            self._write_back = WriteBack(self, self.tiers.on_evict, ahead_bytes=ahead_bytes)
            self.metrics.gauge("host.unwritten_chunks", partial(len, self._write_back))
        self.unstored = 0
        self.parts: list[Part] = []
        self.owner = threading.RLock()
        self._closed = False
        self.metrics.gauge("host.used_bytes", lambda: self.host.used_bytes)
        for tier in self.tiers.readable:
            self.metrics.gauge(f"{tier.name}.used_bytes", partial(getattr, tier, "used_bytes"))
            self.metrics.gauge(f"{tier.name}.available", partial(getattr, tier, "available"))
            tier.on_lost = partial(self._lose, tier=tier)
            tier.on_evict = partial(self.note_gone, tier.name)

    def now_s(self) -> float:
        """The engine's clock."""
        return self.runtime.now_s()

    @property
    def settling(self) -> bool:
        """Whether lower tiers, or other parts, still have answers to give within their
        deadlines."""
        waiting = self.unsettled > 0 and self.tiers.settling
        return waiting or any(part.busy for part in self.parts)

    @property
    def unsettled(self) -> int:
        """Writes to lower tiers that have not ended; after `write_all`, or that are to be."""
        return self._demoting + (self._write_back.left if self._write_back is not None else 0)

    @property
    def unsettled_bytes(self) -> int:
        """Bytes of these writes."""
        return self._demoting_bytes + (
            self._write_back.left_bytes if self._write_back is not None else 0
        )

    def poll(self) -> int:
        """Bring in finished work and look at deadlines; returns how much came in."""
        count = self.runtime.completions.drain()
        if self.host.over_share:
            self.host.trim()
        self.tiers.tick()
        if self._write_back is not None:
            self._write_back.tick()
        for part in self.parts:
            part.tick()
        return count

    def is_arriving(self, key: bytes) -> bool:
        """Whether ``key`` is on its way to host from a lower tier."""
        return key in self._prefetcher

    def prefetch_keys(
        self,
        keys: Sequence[bytes],
        *,
        layout: ChunkLayout,
        parent: bytes | None = None,
        deadline_s: float | None = None,
    ) -> Prefetch:
        """Start moving ``keys`` to host; poll `Prefetch.done`, then `release`.

        ``keys`` is a prefix, or the rest of one whose last earlier chunk is ``parent``.
        """
        self._check_open()
        until_s = deadline_s or self.now_s() + self.config.lookup_deadline_s
        return self._prefetcher.start(keys, parent, layout=layout, deadline_s=until_s)

    def release(self, ticket: Prefetch) -> None:
        """End the ticket: unpin its chunks, want no more of them."""
        self._prefetcher.release(ticket)

    def why_missed(self, ticket: Prefetch, index: int) -> str:
        """Why chunk ``index`` of ``ticket`` is not here; "" when nobody knows it."""
        known = ticket.why_missed(index)
        return known or ("evicted" if ticket.keys[index] in self.evicted else "")

    def reserve_key(
        self, key: bytes, parent: bytes | None, *, layout: ChunkLayout
    ) -> HostChunk | None:
        """A slot to write, or None: already there, being written, or no room (counted)."""
        if key in self.host:
            return None
        chunk = self.host.reserve(key, parent, layout)
        if chunk is None:
            self.metrics.counter("host.store_dropped").inc()
        return chunk

    def commit(self, chunks: Iterable[HostChunk]) -> None:
        """The payloads are written: serve them, and write them to every tier that takes them at
        once.

        A chunk that was dropped since it was reserved is freed instead.
        """
        stored = 0
        for chunk in chunks:
            doomed = chunk.doomed
            self.host.seal(chunk)
            if not doomed:
                stored += 1
                for tier in self.tiers.through:
                    if not tier.holds(chunk.key):
                        self.demote(chunk, tier)
        for tier in self.tiers.through:
            tier.start_stores()
        self.metrics.counter("host.stored").inc(stored)

    def demote(
        self, chunk: HostChunk, tier: RemoteTier, ended: Callable[[], None] = lambda: None
    ) -> None:
        """Write the SEALED ``chunk`` to ``tier``, from its next `RemoteTier.start_stores` on;
        ``ended`` when that is over, however it went."""

        def demoted(status: Status) -> None:
            self._demoted(chunk, status)
            ended()

        self.host.pin(chunk)
        self._demoting += 1
        self._demoting_bytes += chunk.payload_bytes
        tier.store(chunk, demoted)

    def abort(self, chunks: Iterable[HostChunk]) -> None:
        """The payloads will not be written."""
        for chunk in chunks:
            self.host.abort(chunk)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget ``keys`` in every tier: their bytes are not to be trusted."""
        self.host.drop(keys)
        self.tiers.delete(keys)

    def hold(self, chunk: HostChunk) -> None:
        """Native code may still read the pinned ``chunk``: unpin it when it is `released`."""
        if self._was_released(chunk.offset):
            self.host.unpin(chunk)
        else:
            self._lent.setdefault(chunk.offset, []).append(chunk)

    def lose(self, chunk: HostChunk) -> None:
        """Native code may still write the slot: keep it out of use until it is `released`."""
        self.host.lose(chunk)
        if self._was_released(chunk.offset):
            self.host.found(chunk)
        else:
            self._lost[chunk.offset] = chunk

    def recode(
        self,
        keys: Sequence[bytes],
        *,
        tier: str,
        layout: ChunkLayout,
        codec: str,
        level: str = "",
    ) -> Recode:
        """Start storing ``keys`` in ``tier`` in another form; ``codec`` "" is no codec.

        `poll` carries it on, a few chunks at a time, behind loads.

        Raises:
            ConfigError: no such tier, codec or level.
            Unsupported: the tier is only read, or its store keeps the first value of a key.
        """
        self._check_open()
        found = [each for each in self.tiers.readable if each.name == tier]
        if not found:
            names = ", ".join(each.name for each in self.tiers.readable) or "none"
            raise ConfigError(f"no tier is named {tier!r}", hint=f"tiers below host: {names}")
        way = found[0].way(codec, level)
        return Recode(keys, found[0], self.host, layout=layout, way=way, lose=self._lose)

    def on_residency(self, changed: Callable[[str, bytes, bool], None]) -> None:
        """Have ``changed`` told the tier, the key, and whether it is there now, in the owner's
        thread, beside all who asked before.  What a store evicts by itself is not known."""
        self._watchers.append(changed)
        self.host.on_change = partial(self._changed, "host")
        for tier in self.tiers.readable:
            tier.on_change = partial(self._changed, tier.name)

    def note_gone(self, tier: str, keys: Sequence[bytes], policy: str) -> None:
        """Remember how ``keys`` left ``tier``, for who asks why they missed."""
        at_s = self.now_s()
        for key in keys:
            self.evicted.add(key, Eviction(at_s, tier, policy))

    def flush(self, timeout_s: float) -> bool:
        """Block until lower tiers have settled what was stored, or ``timeout_s``."""
        self._wait(lambda: not self.unsettled, timeout_s)
        return not self.unsettled

    def bar_writes(self, meant: Callable[[bytes], bool]) -> Callable[[], None]:
        """Write nothing that is ``meant`` because host may evict it, until what is returned is
        called: it is being deleted."""
        return (lambda: None) if self._write_back is None else self._write_back.bar(meant)

    def write_all(self) -> None:
        """Also write, from now on, what would be written on eviction only: the end is near."""
        if self._write_back is not None:
            self._write_back.write_all()
            self.poll()

    def close(self) -> bool:
        """Write what waits for at most ``close_timeout_s``, then close tiers and memory.

        Returns False when a call of a backend still runs: its threads are daemons and the
        arena stays mapped for them.  Idempotent.
        """
        if self._closed:
            return True
        ended = [part.close() for part in self.parts]
        self.parts.clear()
        self.write_all()
        flushed = self.flush(self.config.close_timeout_s)
        if not flushed:
            self.metrics.counter("close.unflushed").inc(self.unsettled)
        self._closed = True
        clean = self.tiers.close(1.0) and all(ended)
        self.poll()
        if clean and not (self._lost or self._lent):
            self.host.arena.close()
        return flushed and clean

    def released(self, token: int) -> None:
        """A buffer answered ABANDONED can't be touched any more; from any thread."""

        def settle() -> None:
            lent = self._lent.get(token)
            if lent:
                self.host.unpin(lent.pop())
                if not lent:
                    del self._lent[token]
            elif token in self._lost:
                self.host.found(self._lost.pop(token))
            else:
                # Before we know that it was abandoned: the answer is still on its way.
                self._released_early.append(token)

        self.runtime.completions.post(settle)

    def _was_released(self, token: int) -> bool:
        if token not in self._released_early:
            return False
        self._released_early.remove(token)
        return True

    def _changed(self, tier: str, key: bytes, present: bool) -> None:
        for watcher in self._watchers:
            watcher(tier, key, present)

    def _evicted(self, key: bytes, policy: str) -> None:
        self.metrics.counter("host.evicted").inc()
        if self._write_back is not None and key in self._write_back:
            self.metrics.counter("host.evicted_unwritten").inc()
        self.note_gone("host", [key], policy)

    def _lose(self, chunk: HostChunk, tier: RemoteTier) -> None:
        self.lose(chunk)
        tier.count("lost_bytes", chunk.payload_bytes)

    def _demoted(self, chunk: HostChunk, status: Status) -> None:
        self._demoting -= 1
        self._demoting_bytes -= chunk.payload_bytes
        # MISS: it was cleared before it was written.
        self.unstored += status not in (Status.OK, Status.MISS)
        if status is Status.ABANDONED:
            # Native code may still read the slot: it stays pinned until it is released.
            self.hold(chunk)
            return
        self.host.unpin(chunk)

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        end_s = self.now_s() + timeout_s
        while not ready():
            left_s = end_s - self.now_s()
            if left_s <= 0:
                return
            self.runtime.wait(min(left_s, 0.05))
            self.poll()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendClosed("the engine was closed", op="engine", hint="open a new one")
