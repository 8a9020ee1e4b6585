"""What a backend's author gives the suite, and helpers of its checks."""

from __future__ import annotations

import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmcache_core.sdk import Buffer, OpContext, RemoteConnector


class Harness(ABC):
    """One backend under test.  Made anew for every check.

    Args:
        scratch: an empty directory of this check.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    @abstractmethod
    def open(self) -> RemoteConnector:
        """A connector; each call opens the same store again."""

    def stop(self) -> None:
        """Stop what the harness started; nothing by default."""
        return


class Memory:
    """Page-aligned memory cut into buffers with canaries around each."""

    CANARY = 0xA5
    GAP = 4096

    def __init__(self, sizes: Sequence[int]) -> None:
        spans, at = [], self.GAP
        for size in sizes:
            spans.append((at, size))
            at += -(-size // 4096) * 4096 + self.GAP
        self._map = mmap.mmap(-1, at)
        self.array = np.frombuffer(self._map, np.uint8)
        self.array[:] = self.CANARY
        self._spans = spans

    def buffers(self, *, read_only: bool = False) -> list[Buffer]:
        """One buffer a size; read-only for the sources of a put."""
        whole = memoryview(self._map)
        base = int(self.array.ctypes.data)
        views = [whole[at : at + size] for at, size in self._spans]
        return [
            Buffer(view.toreadonly() if read_only else view, base + at, len(view))
            for view, (at, _) in zip(views, self._spans)
        ]

    def bytes_of(self, index: int) -> bytes:
        """What buffer ``index`` holds."""
        at, size = self._spans[index]
        return self.array[at : at + size].tobytes()

    def fill(self, index: int, value: bytes) -> None:
        """Write ``value`` to the start of buffer ``index``."""
        at, _ = self._spans[index]
        self.array[at : at + len(value)] = np.frombuffer(value, np.uint8)

    def canaries_intact(self) -> bool:
        """Whether nothing outside of the buffers was touched."""
        outside = np.ones(len(self.array), bool)
        for at, size in self._spans:
            outside[at : at + size] = False
        return bool((self.array[outside] == self.CANARY).all())


def within(seconds: float) -> OpContext:
    """A context whose deadline is ``seconds`` from now."""
    return OpContext(deadline_s=time.monotonic() + seconds)


def value(seed: int, nbytes: int) -> bytes:
    """Bytes that follow from ``seed``."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8).tobytes()
