"""Two ways for a value's bytes between a buffer and a file, behind one interface."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Protocol

from lmcache_backend_gds.errors import as_oserror
from lmcache_core.sdk import Buffer, ValueFiles


class Mover(Protocol):
    """Thread-safe; each call may block for ever, and raises OSError like system calls."""

    def read(self, path: str, target: Buffer) -> int:
        """Read a file into the start of ``target``; its size, which may be more than ``target``
        holds: then nothing was read."""
        ...

    def write(self, path: str, source: Buffer) -> None:
        """Make a file of ``source``, 0600, synced where the files' `sync` is set."""
        ...


class PosixMover:
    """Plain preadv and pwrite on the buffer's view: host memory only."""

    def __init__(self, files: ValueFiles) -> None:
        self._files = files

    def read(self, path: str, target: Buffer) -> int:
        """See `Mover`."""
        assert target.view is not None
        return self._files.read(path, target.view)

    def write(self, path: str, source: Buffer) -> None:
        """See `Mover`."""
        assert source.view is not None
        self._files.write(path, source.view)


class KvikioMover:
    """kvikio's CuFile, on host views and device addresses.

    CuFile opens its file twice, with and without O_DIRECT.  A put may publish another file under
    the name in between, so it is given a descriptor that is open already, never the name.

    Args:
        files: for names and primitives.
        cufile: `kvikio.CuFile`.
        task_size_bytes: kvikio moves parts of this size at the same time.
    """

    def __init__(
        self, files: ValueFiles, cufile: Callable[[str, str], Any], *, task_size_bytes: int
    ) -> None:
        self._files = files
        self._cufile = cufile
        self._task_size = task_size_bytes

    def read(self, path: str, target: Buffer) -> int:
        """See `Mover`.  The size is known before: kvikio calls a short read an error."""
        fd = self._files.ops.open(path, os.O_RDONLY)
        try:
            nbytes = self._files.ops.fd_size(fd)
            if 0 < nbytes <= target.nbytes:
                with as_oserror(), self._cufile(f"/proc/self/fd/{fd}", "r") as file:
                    future = file.pread(_array(target), size=nbytes, task_size=self._task_size)
                    _expect_all(future.get(), nbytes)
            return nbytes
        finally:
            self._files.ops.close(fd)

    def write(self, path: str, source: Buffer) -> None:
        """See `Mover`.  The file is made here: kvikio would make it 0644."""
        fd = self._files.ops.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if source.nbytes:
                with as_oserror(), self._cufile(f"/proc/self/fd/{fd}", "r+") as file:
                    future = file.pwrite(_array(source), task_size=self._task_size)
                    _expect_all(future.get(), source.nbytes)
            if self._files.sync:
                self._files.ops.fsync(fd)
        finally:
            self._files.ops.close(fd)


class DeviceArray:
    """``__cuda_array_interface__`` over device memory at an address."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, read_only),
            "version": 3,
        }


def _array(buffer: Buffer) -> memoryview | DeviceArray:
    return DeviceArray(buffer.address, buffer.nbytes) if buffer.view is None else buffer.view


def _expect_all(done: int, nbytes: int) -> None:
    if done != nbytes:
        raise OSError(errno.EIO, f"kvikio moved {done} of {nbytes} bytes")
