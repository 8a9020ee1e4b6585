"""A connector that misbehaves on demand, and engines over it on real threads and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest

from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    Buffer,
    GetResult,
    Health,
    OpContext,
    Status,
)
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.transfer.executor import Runtime

CHUNK, PAYLOAD_BYTES = 4, 5000
SLOT_BYTES = stored_bytes(PAYLOAD_BYTES)
LAYOUT = ChunkLayout(chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"unit")
TIER = TierConfig(url="test://", deadline_s=0.2, probe_interval_s=0.1, size_bytes=0)


class Scripted(MemoryConnector):
    """A store that can freeze, fail, lie or abandon; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.thawed = threading.Event()
        self.thawed.set()
        self.calls: list[tuple[str, int]] = []
        self.raises: Exception | None = None
        self.abandon: list[Buffer] | None = None
        self.peak_bytes = 0

    def freeze(self) -> None:
        self.thawed.clear()

    def _enter(self, op: str, width: int) -> None:
        self.calls.append((op, width))
        self.thawed.wait(20)
        if self.raises is not None:
            raise self.raises

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self._enter("exists", len(keys))
        return super().exists(keys, ctx)

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self._enter("get", len(keys))
        if self.abandon is not None:
            self.abandon.extend(targets)
            return [GetResult(Status.ABANDONED)] * len(keys)
        return super().get_into(keys, targets, ctx)

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self._enter("put", len(keys))
        assert all(source.view is not None and source.view.readonly for source in sources)
        if self.abandon is not None:
            self.abandon.extend(sources)
            return [Status.ABANDONED] * len(keys)
        answers = super().put_from(keys, sources, ctx)
        self.peak_bytes = max(self.peak_bytes, self._used_bytes)
        return answers

    def health(self, ctx: OpContext) -> Health:
        self._enter("health", 1)
        return super().health(ctx)


class Pages:
    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.onboarded: list[bool] = []

    def content(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, index])
        return rng.integers(0, 256, PAYLOAD_BYTES, np.uint8)

    def offload(self, index: int, slot: np.ndarray) -> None:
        slot[:] = self.content(index)

    def onboard(self, index: int, slot: np.ndarray) -> None:
        self.onboarded.append(np.array_equal(slot, self.content(index)))


def count(metrics: Metrics, tier: str, event: str, amount: int) -> None:
    metrics.counter(f"{tier}.{event}").inc(amount)


Make = Callable[..., CacheEngine]


@pytest.fixture
def make() -> Iterator[Make]:
    live: list[tuple[CacheEngine, list[MemoryConnector]]] = []

    def build(
        *connectors: MemoryConnector,
        host_chunks: int = 8,
        tier: TierConfig = TIER,
        layout: ChunkLayout = LAYOUT,
        codecs: Codecs | None = None,
        write_ahead_bytes: int = 0,
        close_timeout_s: float = 5.0,
    ) -> CacheEngine:
        runtime, metrics = Runtime(), Metrics()
        config = EngineConfig(
            host_bytes=host_chunks * stored_bytes(layout.payload_bytes),
            chunk_size=CHUNK,
            lookup_deadline_s=0.3,
            close_timeout_s=close_timeout_s,
            write_ahead_bytes=write_ahead_bytes,
        )
        engine = CacheEngine(
            config=config,
            layout=layout,
            namespace=Namespace.of({"model": "unit"}),
            arena=Arena.create(config.host_bytes, prefault=False, warn=print),
            open_tiers=lambda host: [
                RemoteTier(
                    f"t{i}",
                    connector,
                    config=tier,
                    host=host,
                    runtime=runtime,
                    metrics=metrics,
                    encoding=Encoding(
                        tier, codecs or Codecs(), count=partial(count, metrics, f"t{i}")
                    ),
                )
                for i, connector in enumerate(connectors)
            ],
            runtime=runtime,
            metrics=metrics,
        )
        live.append((engine, list(connectors)))
        return engine

    yield build
    for engine, connectors in live:
        for connector in connectors:
            if isinstance(connector, Scripted):
                connector.thawed.set()
        engine.close()


def prompt(seed: int, chunks: int) -> list[int]:
    return [seed * 100 + i // CHUNK for i in range(chunks * CHUNK)]


def until(engine: CacheEngine, ready: Callable[[], bool], limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end, "it did not come to pass"
        engine.runtime.wait(0.01)
        engine.poll()


def stored(engine: CacheEngine, seed: int, chunks: int) -> list[int]:
    """Store a prompt, let it reach the lower tiers, and forget it in host."""
    tokens = prompt(seed, chunks)
    assert engine.store(tokens, Pages(seed)) == chunks
    assert engine.flush(5)
    engine.clear()
    return tokens
