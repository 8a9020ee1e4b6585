"""`ShelfConnector`: what the library can't finish in time is ABANDONED, and released later."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import struct
import threading
from collections.abc import Sequence

from lmcache_backend_shelf.native import load
from lmcache_core.sdk import (
    BackendUnavailable,
    BatchLoop,
    Buffer,
    Capabilities,
    Durability,
    GetResult,
    Health,
    HostServices,
    OpContext,
    Region,
    ReleaseToken,
    Sharing,
    Status,
    status_of_oserror,
)

_GET, _PUT, _DELETE, _EXISTS = range(4)
_TOKEN = struct.Struct("q")
_NO_BUFFER, _END = -1, -2
MAX_LEFT = 32


class Left(TimeoutError):
    """The job goes on without us."""


class ShelfConnector(BatchLoop):
    """Files below ``folder``; thread-safe.

    Raises:
        OSError: the folder can't be used, or the library not be built.
    """

    capabilities = Capabilities(
        max_concurrency=8,
        zero_copy=True,
        regions=True,
        durability=Durability.PROCESS,
        sharing=Sharing.HOST,
    )

    def __init__(self, folder: str, host: HostServices) -> None:
        super().__init__("shelf", clock=host.clock)
        self._native = load()
        self._folder, self._aside = folder, f"{folder}/aside"
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.makedirs(self._aside, mode=0o700, exist_ok=True)
        self._sweep()
        self._host = host
        self._jobs_left = 0
        self._reaped = False
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._reap, name="shelf-reap", daemon=True).start()
        for region in host.regions():
            self.register_region(region)
        host.on_region_added(self.register_region)
        host.on_region_removed(self.unregister_region)

    def register_region(self, region: Region) -> None:
        """Make ``region`` known to the library."""
        self._native.shelf_register(region.address, region.nbytes)

    def unregister_region(self, region: Region) -> None:
        """Forget ``region``."""
        self._native.shelf_unregister(region.address, region.nbytes)

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        return [self._get(key, target, ctx) for key, target in zip(keys, targets)]

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        return [self._put(key, source, ctx) for key, source in zip(keys, sources)]

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return self._do(_EXISTS, key, timeout_s)[0] == 0

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        self._do(_DELETE, key, timeout_s)

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        """See `get_into`, which hands over addresses."""
        raise NotImplementedError

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        """See `put_from`, which hands over addresses."""
        raise NotImplementedError

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        if ctx.remaining_s() <= 0:
            return Health(ok=False, reason="the deadline has passed")
        return Health(ok=self._jobs_left < MAX_LEFT, reason=f"{self._jobs_left} jobs hang")

    def close_resources(self) -> None:
        os.write(self._writer, _TOKEN.pack(_END))

    def _get(self, key: bytes, target: Buffer, ctx: OpContext) -> GetResult:
        if self.usable_view(target) is None:
            return GetResult(Status.REJECTED)
        if ctx.remaining_s() <= 0:
            return GetResult(Status.TIMED_OUT)
        try:
            error, nbytes = self._do(_GET, key, ctx.remaining_s(), target)
        except Left:
            return GetResult(Status.ABANDONED)
        except OSError as failed:
            return GetResult(status_of_oserror(failed))
        if error == errno.EMSGSIZE:
            return GetResult(Status.SIZE_MISMATCH, nbytes)
        return GetResult(Status.OK, nbytes) if not error else GetResult(Status.MISS)

    def _put(self, key: bytes, source: Buffer, ctx: OpContext) -> Status:
        too_large = source.nbytes > self.capabilities.max_value_bytes
        if too_large or self.usable_view(source) is None:
            return Status.REJECTED
        if ctx.remaining_s() <= 0:
            return Status.TIMED_OUT
        try:
            self._do(_PUT, key, ctx.remaining_s(), source)
        except Left:
            return Status.ABANDONED
        except OSError as failed:
            return status_of_oserror(failed)
        return Status.OK

    def _do(
        self, op: int, key: bytes, timeout_s: float, buffer: Buffer | None = None
    ) -> tuple[int, int]:
        """One job: 0, ENOENT or EMSGSIZE, and the value's size.

        Raises:
            Left: it is not done in time, and the library still has the buffer.
            OSError: any other error of the library.
            BackendUnavailable: too many jobs hang.
        """
        if self._jobs_left >= MAX_LEFT:
            raise BackendUnavailable(
                f"{self._jobs_left} jobs hang", backend="shelf", hint="look at the disk"
            )
        path = f"{self._folder}/{key.hex()}".encode()
        aside = f"{self._aside}/{os.getpid()}-{secrets.token_hex(8)}".encode()
        at, nbytes = (buffer.address, buffer.nbytes) if buffer else (0, 0)
        token = buffer.token if buffer else _NO_BUFFER
        job = self._native.shelf_start(op, path, aside, at, nbytes, token, self._writer)
        if not job:
            raise OSError(ctypes.get_errno(), "no thread for a job")
        error, size = ctypes.c_int(), ctypes.c_uint64()
        with self._lock:
            self._jobs_left += 1
        if self._native.shelf_wait(job, timeout_s, ctypes.byref(error), ctypes.byref(size)):
            raise Left(f"not done within {timeout_s:.3f} s")
        with self._lock:
            self._jobs_left -= 1
            if self._closed and not self._reaped:
                os.write(self._writer, _TOKEN.pack(_END))
        if error.value not in (0, errno.ENOENT, errno.EMSGSIZE):
            raise OSError(error.value, os.strerror(error.value))
        if error.value == errno.ENOENT and op == _PUT:
            raise OSError(errno.EIO, "the folder is gone")
        return error.value, size.value

    def _reap(self) -> None:
        """Give back the buffers of jobs that ended late; ends after close, with the last one."""
        while not self._reaped:
            token = _TOKEN.unpack(os.read(self._reader, _TOKEN.size))[0]
            with self._lock:
                self._jobs_left -= token != _END
                self._reaped = self._closed and self._jobs_left == 0
            if token >= 0:
                self._host.released(ReleaseToken(token))
        os.close(self._reader)
        os.close(self._writer)

    def _sweep(self) -> None:
        """Remove what writers that are gone left aside."""
        for name in os.listdir(self._aside):
            if not os.path.exists(f"/proc/{name.partition('-')[0]}"):
                os.unlink(f"{self._aside}/{name}")
