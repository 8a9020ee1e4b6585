"""`CacheEngine`: the only part that knows both the index and the tiers.

One thread owns an engine: it calls every method, and `poll` brings in what other threads
have finished.  Nothing here waits for I/O, except the calls that say "blocks".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache_core.config import EngineConfig
from lmcache_core.envelope import stored_bytes
from lmcache_core.keys import ChunkHasher, Namespace, key_suffix
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.misses import MissLog
from lmcache_core.planner import plan
from lmcache_core.prefetch import Prefetch, Prefetcher
from lmcache_core.sdk import BackendClosed, ConfigError, Status
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.tiers.stack import TierStack
from lmcache_core.transfer.executor import Runtime


class Pages(Protocol):
    """Where a chunk's payload comes from and goes to; ``index`` counts chunks from the
    start of the prefix.  Slots are flat uint8 arrays of ``payload_bytes``."""

    def offload(self, index: int, slot: npt.NDArray[np.uint8]) -> None:
        """Copy chunk ``index`` into ``slot``."""
        ...

    def onboard(self, index: int, slot: npt.NDArray[np.uint8]) -> None:
        """Copy ``slot`` to where chunk ``index`` belongs."""
        ...


@dataclass(frozen=True, slots=True)
class LookupResult:
    """The longest prefix that the tiers hold: ``tokens`` in all, and by tier."""

    tokens: int
    tokens_by_tier: dict[str, int] = field(default_factory=dict)


class CacheEngine:
    """lookup / store / retrieve / prefetch / pin / unpin / clear / close over tiers.

    Args:
        config: frozen settings.
        layout: of every chunk.
        namespace: what the chunks belong to; see `keys.Namespace`.
        arena: host memory; the engine closes it.
        tiers: below host, built by `lmcache_core.tiers.stack.open_tiers`.
        runtime: clock, threads and waiting; a simulation gives its own.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        layout: ChunkLayout,
        namespace: Namespace,
        arena: Arena,
        open_tiers: Callable[[HostTier], Sequence[RemoteTier]] = lambda host: (),
        runtime: Runtime | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        if layout.chunk_size != config.chunk_size:
            raise ConfigError(
                f"layout has chunks of {layout.chunk_size} tokens, config {config.chunk_size}"
            )
        self.config = config
        self.layout = layout
        self.namespace = namespace
        self.metrics = metrics or Metrics()
        self.runtime = runtime or Runtime()
        self.misses = MissLog()
        self.host = HostTier(arena, self._evicted)
        self.tiers = TierStack(open_tiers(self.host))
        self._prefetcher = Prefetcher(
            self.host,
            self.tiers,
            payload_bytes=layout.payload_bytes,
            metrics=self.metrics,
            now_s=self.runtime.now_s,
            lose=self._lose,
        )
        self._suffix = key_suffix(0, 0)
        self._hasher = self._make_hasher(namespace)
        self._lost: dict[int, HostChunk] = {}
        self._lent: dict[int, list[HostChunk]] = {}
        self._generation = 0
        self._demoting = 0
        self._pinned: dict[bytes, HostChunk] = {}
        self._closed = False
        self.metrics.gauge("host.used_bytes", lambda: self.host.used_bytes)
        for tier in self.tiers.readable:
            self.metrics.gauge(f"{tier.name}.used_bytes", partial(getattr, tier, "used_bytes"))
            self.metrics.gauge(f"{tier.name}.available", partial(getattr, tier, "available"))

    def now_s(self) -> float:
        """The engine's clock."""
        return self.runtime.now_s()

    @property
    def generation(self) -> int:
        """Grows with every `clear`; a store reserved before is not committed after."""
        return self._generation

    @property
    def slot_bytes(self) -> int:
        """Host memory of one chunk, its header included."""
        return stored_bytes(self.layout.payload_bytes)

    @property
    def settling(self) -> bool:
        """Whether lower tiers still have answers to give within their deadlines."""
        return self._demoting > 0 and self.tiers.settling

    def keys(self, tokens: Sequence[int], hasher: ChunkHasher | None = None) -> list[bytes]:
        """Stored keys of every whole chunk of ``tokens``."""
        hasher = hasher or self._hasher
        return self.keys_of(hasher.digests(tokens), hasher.namespace)

    def keys_of(self, digests: Sequence[bytes], namespace: Namespace) -> list[bytes]:
        """Stored keys of chunk ``digests`` in ``namespace``."""
        tag, suffix = namespace.tag, self._suffix
        return [tag + digest + suffix for digest in digests]

    def poll(self) -> int:
        """Bring in finished work and look at deadlines; returns how much came in."""
        count = self.runtime.completions.drain()
        self.tiers.tick()
        return count

    def is_arriving(self, key: bytes) -> bool:
        """Whether ``key`` is on its way to host from a lower tier."""
        return key in self._prefetcher

    def prefetch(
        self,
        keys: Sequence[bytes],
        deadline_s: float | None = None,
        parent: bytes | None = None,
    ) -> Prefetch:
        """Start moving ``keys`` to host; poll `Prefetch.done`, then `release`.

        ``keys`` is a prefix, or the rest of one whose last earlier chunk is ``parent``.
        """
        self._check_open()
        until_s = deadline_s or self.now_s() + self.config.lookup_deadline_s
        return self._prefetcher.start(keys, parent, until_s)

    def release(self, ticket: Prefetch) -> None:
        """End the ticket: unpin its chunks, want no more of them."""
        self._prefetcher.release(ticket)

    def lookup(self, tokens: Sequence[int]) -> LookupResult:
        """The longest prefix over all tiers, without moving it.

        Blocks for at most ``lookup_deadline_s``, and only when host does not hold all.
        """
        self._check_open()
        keys = self.keys(tokens)
        size = self.config.chunk_size
        resident = self.host.prefix(keys)
        by_tier = {"host": resident * size} if resident else {}
        missing = keys[resident:]
        names = ["host", *(tier.name for tier in self.tiers.readable)]
        rows: list[list[bool] | None] = [None] * len(names)
        rows[0] = [self.host.get(key) is not None for key in missing]

        def answered(position: int, present: list[bool], why: str) -> None:
            rows[position + 1] = present

        def settled() -> bool:
            """Whether no tier that has not answered could change the result."""
            tiers, decided = plan(rows)
            return decided and None not in rows[: max(tiers, default=0)]

        if missing and self.tiers.readable:
            self.tiers.residency(missing, answered)
            self._wait(settled, self.config.lookup_deadline_s)
        for tier in plan(rows).tiers:
            name = names[tier]
            by_tier[name] = by_tier.get(name, 0) + size
        return LookupResult(sum(by_tier.values()), by_tier)

    def retrieve(self, tokens: Sequence[int], pages: Pages) -> int:
        """Onboard the longest prefix of ``tokens``; returns its length in tokens.

        Blocks until the chunks are there, at most ``lookup_deadline_s``.
        """
        ticket = self.prefetch(self.keys(tokens))
        if not ticket.done:
            self._wait(lambda: ticket.done, self.config.lookup_deadline_s)
        hits = ticket.hits()
        payload = self.host.payload
        for index, chunk in enumerate(hits):
            pages.onboard(index, payload(chunk))
        self.release(ticket)
        return len(hits) * self.config.chunk_size

    def store(self, tokens: Sequence[int], pages: Pages) -> int:
        """Offload every whole chunk of ``tokens`` that host lacks; lower tiers follow in
        the background.  Returns how many chunks were taken."""
        self._check_open()
        keys = self.keys(tokens)
        chunks: list[HostChunk] = []
        first = self.host.prefix(keys)
        payload = self.host.payload
        for index in range(first, len(keys)):
            chunk = self.reserve(keys[index], keys[index - 1] if index else None)
            if chunk is not None:
                pages.offload(index, payload(chunk))
                chunks.append(chunk)
        self.commit(chunks)
        self.host.touch(keys)
        return len(chunks)

    def reserve(self, key: bytes, parent: bytes | None) -> HostChunk | None:
        """A slot to write, or None: already there, being written, or no room (counted)."""
        if key in self.host:
            return None
        chunk = self.host.reserve(key, parent, self.layout.payload_bytes)
        if chunk is None:
            self.metrics.counter("host.store_dropped").inc()
        return chunk

    def commit(self, chunks: Sequence[HostChunk], generation: int | None = None) -> None:
        """The payloads are written: serve them, and write them through to every tier.

        With a ``generation`` older than the engine's the chunks are dropped instead.
        """
        stale = generation is not None and generation != self._generation
        for chunk in chunks:
            if stale:
                self.host.abort(chunk)
                continue
            doomed = chunk.doomed
            self.host.seal(chunk)
            if not doomed:
                self._demote(chunk)
        for tier in self.tiers.writable:
            tier.start_stores()
        self.metrics.counter("host.stored").inc(0 if stale else len(chunks))

    def abort(self, chunks: Sequence[HostChunk]) -> None:
        """The payloads will not be written."""
        for chunk in chunks:
            self.host.abort(chunk)

    def pin(self, tokens: Sequence[int]) -> int:
        """Keep the prefix of ``tokens`` that is in host until `unpin`; its tokens."""
        keys = self.keys(tokens)
        count = self.host.prefix(keys)
        for key in keys[:count]:
            chunk = self.host.get(key)
            if chunk is not None and key not in self._pinned:
                self.host.pin(chunk)
                self._pinned[key] = chunk
        return count * self.config.chunk_size

    def unpin(self, tokens: Sequence[int]) -> int:
        """End `pin`; the tokens that were pinned."""
        chunks = [self._pinned.pop(key, None) for key in self.keys(tokens)]
        for chunk in chunks:
            if chunk is not None:
                self.host.unpin(chunk)
        return sum(chunk is not None for chunk in chunks) * self.config.chunk_size

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget ``keys`` in every tier: their bytes are not to be trusted."""
        self.host.drop(keys)
        self.tiers.delete(keys)

    def clear(self, *, lower_tiers: bool = False) -> int:
        """Forget every host chunk and what is being stored; with ``lower_tiers`` also what
        this namespace is known to have there.  Returns the number of host chunks."""
        self._generation += 1
        for chunk in self._pinned.values():
            self.host.unpin(chunk)
        self._pinned.clear()
        dropped = self.host.drop(self.host.keys())
        if lower_tiers:
            self.tiers.delete_tag(self.namespace.tag)
        return dropped

    def rebase(self, namespace: Namespace) -> None:
        """Go on under another namespace, as after new weights."""
        self.namespace = namespace
        self._hasher = self._make_hasher(namespace)

    def hasher(self, namespace: Namespace) -> ChunkHasher:
        """A hasher for a derived ``namespace`` (tenant, adapter)."""
        return self._hasher if namespace is self.namespace else self._make_hasher(namespace)

    def on_residency(self, changed: Callable[[str, bytes, bool], None]) -> None:
        """Have ``changed`` told the tier, the key, and whether it is there now, in the owner's
        thread.  What a store evicts by itself is not known."""
        self.host.on_change = partial(changed, "host")
        for tier in self.tiers.readable:
            tier.on_change = partial(changed, tier.name)

    def flush(self, timeout_s: float) -> bool:
        """Block until lower tiers have settled what was stored, or ``timeout_s``."""
        self._wait(lambda: not self._demoting, timeout_s)
        return not self._demoting

    def close(self) -> bool:
        """Flush for at most ``close_timeout_s``, then close tiers and memory.

        Returns False when a call of a backend still runs: its threads are daemons and the
        arena stays mapped for them.  Idempotent.
        """
        if self._closed:
            return True
        flushed = self.flush(self.config.close_timeout_s)
        if not flushed:
            self.metrics.counter("close.unflushed").inc(self._demoting)
        self._closed = True
        clean = self.tiers.close(1.0)
        self.poll()
        if clean and not (self._lost or self._lent):
            self.host.arena.close()
        return flushed and clean

    def released(self, token: int) -> None:
        """A buffer answered ABANDONED can't be touched any more; from any thread."""

        def settle() -> None:
            for lent in self._lent.pop(token, ()):
                self.host.unpin(lent)
            chunk = self._lost.pop(token, None)
            if chunk is not None:
                self.host.found(chunk)

        self.runtime.completions.post(settle)

    def _evicted(self, key: bytes) -> None:
        self.metrics.counter("host.evicted").inc()
        self.misses.evicted(key)

    def _lose(self, chunk: HostChunk, tier: RemoteTier) -> None:
        self.host.lose(chunk)
        self._lost[chunk.offset] = chunk
        tier.count("lost_bytes", chunk.payload_bytes)

    def _demote(self, chunk: HostChunk) -> None:
        for tier in self.tiers.writable:
            if tier.holds(chunk.key):
                continue
            self.host.pin(chunk)
            self._demoting += 1
            tier.store(chunk, lambda status: self._demoted(chunk, status))

    def _demoted(self, chunk: HostChunk, status: Status) -> None:
        self._demoting -= 1
        if status is Status.ABANDONED:
            # Native code may still read the slot: it stays pinned until it is released.
            self._lent.setdefault(chunk.offset, []).append(chunk)
            return
        self.host.unpin(chunk)

    def _make_hasher(self, namespace: Namespace) -> ChunkHasher:
        return ChunkHasher(
            namespace,
            chunk_size=self.config.chunk_size,
            algorithm=self.config.hash_algorithm,
        )

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
