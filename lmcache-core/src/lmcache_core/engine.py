"""`CacheEngine`: the cache of one model, by tokens.

One thread owns an engine, like a `ChunkEngine`; nothing here waits for I/O, except the calls
that say "blocks".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.envelope import stored_bytes
from lmcache_core.keys import ChunkHasher, Namespace, key_suffix
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.planner import plan
from lmcache_core.prefetch import Prefetch
from lmcache_core.recode import Recode
from lmcache_core.sdk import ConfigError
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier
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


class CacheEngine(ChunkEngine):
    """lookup / store / retrieve / pin / unpin / clear of prefixes, in one namespace and layout.

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
        super().__init__(
            config=config, arena=arena, open_tiers=open_tiers, runtime=runtime, metrics=metrics
        )
        self.layout = layout
        self.namespace = namespace
        self._suffix = key_suffix(0, 0)
        self._hasher = self._make_hasher(namespace)
        self._pinned: dict[bytes, HostChunk] = {}

    @property
    def slot_bytes(self) -> int:
        """Host memory of one chunk, its header included."""
        return stored_bytes(self.layout.payload_bytes)

    def keys(self, tokens: Sequence[int], hasher: ChunkHasher | None = None) -> list[bytes]:
        """Stored keys of every whole chunk of ``tokens``."""
        hasher = hasher or self._hasher
        return self.keys_of(hasher.digests(tokens), hasher.namespace)

    def keys_of(self, digests: Sequence[bytes], namespace: Namespace) -> list[bytes]:
        """Stored keys of chunk ``digests`` in ``namespace``."""
        tag, suffix = namespace.tag, self._suffix
        return [tag + digest + suffix for digest in digests]

    def prefetch(
        self,
        keys: Sequence[bytes],
        deadline_s: float | None = None,
        parent: bytes | None = None,
    ) -> Prefetch:
        """`prefetch_keys` in this engine's layout."""
        return self.prefetch_keys(keys, layout=self.layout, parent=parent, deadline_s=deadline_s)

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

    def compress(
        self,
        tokens: Sequence[int] | None = None,
        *,
        tier: str,
        codec: str,
        level: str = "",
        unused_for_s: float = 0.0,
    ) -> Recode:
        """Have stored chunks of this engine encoded, in the background.

        Args:
            tokens: the prefix; None takes everything that ``tier`` is known to hold.
            tier: name of a tier below host.
            unused_for_s: leave alone what was stored or read since.

        Raises:
            ConfigError, Unsupported: see `recode`.
        """
        keys = self._chosen_keys(tokens, tier, unused_for_s)
        return self.recode(keys, tier=tier, layout=self.layout, codec=codec, level=level)

    def decompress(
        self,
        tokens: Sequence[int] | None = None,
        *,
        tier: str,
        unused_for_s: float = 0.0,
    ) -> Recode:
        """The reverse of `compress`.  What a lossy codec has taken away stays away."""
        return self.compress(tokens, tier=tier, codec="", unused_for_s=unused_for_s)

    def _chosen_keys(
        self, tokens: Sequence[int] | None, tier: str, unused_for_s: float
    ) -> list[bytes]:
        found = [each for each in self.tiers.readable if each.name == tier]
        if tokens is not None and not unused_for_s:
            return self.keys(tokens)
        held = [
            key
            for each in found
            for key in each.keys_of(self.namespace.tag, unused_for_s=unused_for_s)
            if key.endswith(self._suffix)
        ]
        if tokens is None:
            return held
        wanted = set(held)
        return [key for key in self.keys(tokens) if key in wanted]

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
        """`reserve_key` in this engine's layout."""
        return self.reserve_key(key, parent, layout=self.layout)

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

    def clear(self, *, lower_tiers: bool = False) -> int:
        """Forget every host chunk and what is being stored; with ``lower_tiers`` also what
        this namespace is known to have there.  Returns the number of host chunks."""
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

    def _make_hasher(self, namespace: Namespace) -> ChunkHasher:
        return ChunkHasher(
            namespace,
            chunk_size=self.config.chunk_size,
            algorithm=self.config.hash_algorithm,
        )
