"""Memory that a check lends to a connector, watched on all sides."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np

from lmcache_core.sdk import Buffer, MemoryKind, Region, ReleaseToken

PAGE = 4096
_PROT_NONE, _PROT_READ = 0, 1


class Memory:
    """Page-aligned buffers with canaries around each.

    Args:
        sizes: bytes of each buffer.
        offset: added to every address, to break alignment.
        region_id: of the one `Region`, a memfd, that the whole is; below 0: anonymous memory.
    """

    CANARY = 0xA5
    GAP = PAGE

    def __init__(self, sizes: Sequence[int], *, offset: int = 0, region_id: int = -1) -> None:
        self._spans: list[tuple[int, int]] = []
        at = self.GAP
        for size in sizes:
            self._spans.append((at + offset, size))
            at += -(-(size + offset) // PAGE) * PAGE + self.GAP
        self.fd = -1
        if region_id >= 0:
            self.fd = os.memfd_create("conformance")
            os.ftruncate(self.fd, at)
        self._map = mmap.mmap(self.fd, at)
        self.array = np.frombuffer(self._map, np.uint8)
        self.array[:] = self.CANARY
        self.address = int(self.array.ctypes.data)
        self.region = (
            Region(region_id, self.address, at, MemoryKind.HOST, self.fd)
            if region_id >= 0
            else None
        )

    @classmethod
    def of(cls, values: Sequence[bytes], *, offset: int = 0) -> Memory:
        """One buffer a value, filled with it."""
        made = cls([len(each) for each in values], offset=offset)
        for index, each in enumerate(values):
            made.fill(index, each)
        return made

    def buffers(self, *, read_only: bool = False, first_token: int = 0) -> list[Buffer]:
        """One buffer a size; read-only for the sources of a put."""
        whole = memoryview(self._map)
        made = []
        for number, (at, size) in enumerate(self._spans):
            view = whole[at : at + size]
            made.append(
                Buffer(
                    view.toreadonly() if read_only else view,
                    self.address + at,
                    size,
                    region=self.region,
                    token=ReleaseToken(first_token + number),
                )
            )
        return made

    def bytes_of(self, index: int, nbytes: int | None = None) -> bytes:
        """What buffer ``index`` holds, or its first ``nbytes``."""
        at, size = self._spans[index]
        return self.array[at : at + (size if nbytes is None else nbytes)].tobytes()

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

    def untouched(self) -> bool:
        """Whether nothing at all was touched."""
        return bool((self.array == self.CANARY).all())

    def forbid(self, *, reading: bool = True) -> None:
        """Take the pages away: a later write (and read) kills the process.

        With ``reading=False`` they may still be read.  For use in a child process only.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        protection = _PROT_NONE if reading else _PROT_READ
        address, size = ctypes.c_void_p(self.address), ctypes.c_size_t(len(self._map))
        if libc.mprotect(address, size, protection):
            raise OSError(ctypes.get_errno(), "mprotect")


def value(seed: int, nbytes: int) -> bytes:
    """Bytes that follow from ``seed``."""
    return np.random.default_rng(seed).bytes(nbytes)
