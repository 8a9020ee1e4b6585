"""`Lending`: the buffers of one call, as the helper process can reach them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence

from lmcache_backend_mooncake.helper import ATTACHED, Place
from lmcache_core.sdk import Buffer, Region

_ALIGN = 4096


class Lending:
    """Buffers in a mapped region are lent as they lie; the others through a memfd of the call.

    Args:
        buffers: with views.
        mapped: regions that the helper can reach.

    Attributes:
        places: one a buffer.
        inside: whether a buffer is lent as it lies.
        fds: to send along.

    Raises:
        OSError: no memory or no descriptor for the memfd.
    """

    def __init__(self, buffers: Sequence[Buffer], mapped: Mapping[int, Region]) -> None:
        self._buffers = buffers
        self.places: list[Place] = []
        self.inside: list[bool] = []
        self.fds: tuple[int, ...] = ()
        self.attached_bytes = 0
        self._map: mmap.mmap | None = None
        for buffer in buffers:
            region = buffer.region
            inside = region is not None and mapped.get(region.region_id) == region
            self.inside.append(inside)
            if inside and region is not None:
                place = (region.region_id, buffer.address - region.address, buffer.nbytes)
            else:
                place = (ATTACHED, self.attached_bytes, buffer.nbytes)
                self.attached_bytes += -(-buffer.nbytes // _ALIGN) * _ALIGN
            self.places.append(place)
        if self.attached_bytes:
            fd = os.memfd_create("lmcache-mooncake", os.MFD_CLOEXEC)
            self.fds = (fd,)
            try:
                os.ftruncate(fd, self.attached_bytes)
                self._map = mmap.mmap(fd, self.attached_bytes)
            except OSError:
                os.close(fd)
                raise

    def copy_in(self) -> None:
        """Before a put."""
        for buffer, (region, at, size) in zip(self._buffers, self.places):
            if region == ATTACHED and self._map is not None and buffer.view is not None:
                self._map[at : at + size] = buffer.view

    def copy_out(self, index: int, nbytes: int) -> None:
        """After a get of ``nbytes`` bytes."""
        region, at, _ = self.places[index]
        view = self._buffers[index].view
        if region == ATTACHED and self._map is not None and view is not None:
            with memoryview(self._map) as whole:
                view[:nbytes] = whole[at : at + nbytes]

    def close(self) -> None:
        """Give the memfd up; the helper keeps its own hold on it while it needs it."""
        if self._map is not None:
            self._map.close()
        for fd in self.fds:
            os.close(fd)
        self.fds, self._map = (), None
