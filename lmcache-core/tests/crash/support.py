"""An engine over a file tier whose every chunk's right bytes follow from its tokens."""

from __future__ import annotations

import numpy as np

from lmcache_core.config import from_mapping
from lmcache_core.engine import CacheEngine
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.opening import open_engine

CHUNK, CHUNKS, PAYLOAD_BYTES = 64, 3, 300_000


class Content:
    """One prompt of `CHUNKS` chunks, its pages, and a check of what comes back."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = [number + 3] * (CHUNK * CHUNKS)
        self.wrong = 0

    def _bytes(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.number, index])
        return rng.integers(0, 256, PAYLOAD_BYTES, np.uint8)

    def offload(self, index: int, slot: np.ndarray) -> None:
        slot[:] = self._bytes(index)

    def onboard(self, index: int, slot: np.ndarray) -> None:
        self.wrong += not np.array_equal(slot, self._bytes(index))


def open_test_engine(directory: str) -> CacheEngine:
    config = from_mapping(
        {
            "chunk_size": CHUNK,
            "prefault": False,
            "tiers": [{"host": "8MiB"}, {"url": f"file://{directory}", "size": "64MiB"}],
        }
    )
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"crash")
    return open_engine(config, layout=layout, namespace=Namespace.of({"model": "crash"}))
