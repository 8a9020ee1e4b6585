"""The host tier's memory: one anonymous file, mapped by every process that shares it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmcache_core.memory import numa
from lmcache_core.memory.pin import HostPinner
from lmcache_core.sdk.buffers import MemoryKind, Region
from lmcache_core.sdk.errors import ConfigError, LMCacheError

REGION_ID = 1
_NAME = "lmcache-arena"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The last one, so that no process can forbid the others to map it for writing."""
_MADV_POPULATE_WRITE = 23
_PREFAULT_STEP_BYTES = 32 << 20
_PREFAULT_JOIN_S = 5.0


class ArenaError(LMCacheError):
    """The memory can't be had, attached or addressed."""


@dataclass(frozen=True, slots=True)
class ArenaRef:
    """Where another process finds an arena: ``/proc/<pid>/fd/<fd>``, of ``nbytes`` bytes."""

    pid: int
    fd: int
    nbytes: int


class Arena:
    """``nbytes`` bytes of shared memory at one address.  Made by `create`, `attach`, `from_fd`.

    Views may be used from any thread; `pin` and `close` belong to the owner thread.

    Attributes:
        ref: what another process needs to `attach`.
    """

    def __init__(self, mapped: mmap.mmap, fd: int, ref: ArenaRef, warn: Callable[[str], None]):
        self.ref = ref
        self._map = mapped
        self._fd = fd
        self._warn = warn
        self._view: memoryview | None = memoryview(mapped)
        self._array: NDArray[np.uint8] | None = np.frombuffer(mapped, dtype=np.uint8)
        self._address = int(self._array.ctypes.data)
        self._pinner: HostPinner | None = None
        self._stop = threading.Event()
        self._prefault: threading.Thread | None = None
        self._unmapped = False

    @classmethod
    def create(
        cls,
        nbytes: int,
        *,
        huge_pages: bool = True,
        numa_node: int | None = None,
        prefault: bool = True,
        warn: Callable[[str], None],
    ) -> Arena:
        """Make a new arena; its size is sealed, so no process can shrink it under another.

        Huge pages, the NUMA node and prefaulting are best effort: a failure is one line to
        ``warn``.  Prefaulting runs in a daemon thread.

        Raises:
            ConfigError: ``nbytes`` is not positive.
            ArenaError: the system gives no memory file or mapping of that size.
        """
        if nbytes <= 0:
            raise ConfigError(
                f"an arena of {nbytes} bytes", op="arena", hint="give the host tier a size"
            )
        fd = -1
        try:
            fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapped = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            raise ArenaError(
                f"no arena of {nbytes} bytes: {error}",
                op="create",
                hint="make the host tier smaller, or raise the limit on memory",
            ) from error
        arena = cls(mapped, fd, ArenaRef(os.getpid(), fd, nbytes), warn)
        if huge_pages:
            arena._advise_huge_pages()
        if numa_node is not None:
            numa.bind(arena.address, nbytes, numa_node, warn=warn)
        if prefault:
            arena._start_prefault()
        return arena

    @classmethod
    def attach(cls, ref: ArenaRef, *, warn: Callable[[str], None], prefault: bool = True) -> Arena:
        """Map the arena of another (or this) process, readable and writable.

        Raises:
            ArenaError: the process is gone, may not be looked into, or its file is not an
                arena of exactly ``ref.nbytes`` bytes.
        """
        path = f"/proc/{ref.pid}/fd/{ref.fd}"
        try:
            # The number may name another file by now: looked at before it is opened.
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
                raise ArenaError(f"{path} is no arena", op="attach", hint="ask for its ref anew")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ArenaError(
                f"{path} can't be opened: {error}", op="attach", hint=_attach_hint(error)
            ) from error
        return cls._map_file(fd, ref, warn=warn, prefault=prefault)

    @classmethod
    def from_fd(
        cls, fd: int, nbytes: int, *, warn: Callable[[str], None], prefault: bool = False
    ) -> Arena:
        """Map the arena whose file another process has handed over; takes ``fd`` in any case.

        Raises:
            ArenaError: the file is no arena of exactly ``nbytes`` bytes, or can't be mapped.
        """
        ref = ArenaRef(os.getpid(), fd, nbytes)
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        if not sealed:
            # Its owner could shrink it under us, and every access behind its end would kill.
            os.close(fd)
            raise ArenaError("a file that is no arena", op="attach", hint="update both packages")
        return cls._map_file(fd, ref, warn=warn, prefault=prefault)

    @classmethod
    def _map_file(
        cls, fd: int, ref: ArenaRef, *, warn: Callable[[str], None], prefault: bool
    ) -> Arena:
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != ref.nbytes or ref.nbytes <= 0:
                raise ArenaError(
                    f"the file has {found.st_size} bytes, the arena should have {ref.nbytes}",
                    op="attach",
                    hint="ask for its ref anew",
                )
            mapped = mmap.mmap(fd, ref.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError, OverflowError, ArenaError) as error:
            os.close(fd)
            if isinstance(error, ArenaError):
                raise
            raise ArenaError(
                f"an arena of {ref.nbytes} bytes can't be mapped: {error}",
                op="attach",
                hint=_attach_hint(error),
            ) from error
        arena = cls(mapped, fd, ref, warn)
        if prefault:
            arena._start_prefault()
        return arena

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.ref.nbytes

    @property
    def address(self) -> int:
        """Address of the first byte in this process, page aligned."""
        return self._address

    @property
    def array(self) -> NDArray[np.uint8]:
        """The whole arena, shape ``(nbytes,)``, writable.  Keeps the mapping alive.

        Raises:
            ArenaError: the arena is closed.
        """
        if self._array is None:
            raise ArenaError("the arena is closed", op="array")
        return self._array

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes ``[offset, offset + nbytes)``, writable, format ``B``.

        Raises:
            ArenaError: they do not lie inside the arena, or it is closed.
        """
        if self._view is None:
            raise ArenaError("the arena is closed", op="view")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.ref.nbytes:
            raise ArenaError(
                f"[{offset}, {offset} + {nbytes}) is outside of {self.ref.nbytes} bytes", op="view"
            )
        return self._view[offset : offset + nbytes]

    @property
    def region(self) -> Region:
        """The arena as a region that connectors may register; PINNED once `pin` succeeded."""
        kind = MemoryKind.HOST if self._pinner is None else MemoryKind.PINNED
        return Region(REGION_ID, self._address, self.ref.nbytes, kind, self._fd)

    def pin(self, pinner: HostPinner | None = None) -> bool:
        """Register the memory with CUDA; whether it is pinned now.  Initialises CUDA.

        A failure is one line to ``warn`` and False.

        Raises:
            ArenaError: the arena is closed.
        """
        if self._view is None:
            raise ArenaError("the arena is closed", op="pin")
        if self._pinner is None:
            pinner = pinner or HostPinner(warn=self._warn)
            if pinner.register(self._address, self.ref.nbytes):
                self._pinner = pinner
        return self._pinner is not None

    def wait_prefaulted(self, timeout_s: float) -> bool:
        """Block until prefaulting has ended, at most ``timeout_s``; True when it has."""
        if self._prefault is not None:
            self._prefault.join(timeout_s)
            return not self._prefault.is_alive()
        return True

    def close(self) -> bool:
        """Unpin, stop prefaulting, unmap and close the file.  Idempotent.

        Returns:
            Whether the memory is unmapped.  While views or arrays are still held it stays
            mapped (False); a later close tries again.
        """
        if self._unmapped:
            return True
        self._stop.set()
        if self._prefault is not None:
            self._prefault.join(_PREFAULT_JOIN_S)
            if self._prefault.is_alive():
                return False
            self._prefault = None
        if self._pinner is not None:
            self._pinner.unregister(self._address)
            self._pinner = None
        self._array = None
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            self._map.close()
        except BufferError:
            return False
        self._unmapped = True
        return True

    def _advise_huge_pages(self) -> None:
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, AttributeError) as error:
            self._warn(f"the arena has no huge pages: {error}")

    def _start_prefault(self) -> None:
        self._prefault = threading.Thread(
            target=self._prefault_pages, name="lmcache-prefault", daemon=True
        )
        self._prefault.start()

    def _prefault_pages(self) -> None:
        # Not mmap.madvise: it keeps the interpreter's lock for the whole step.
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.restype = ctypes.c_int
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start in range(0, self.ref.nbytes, _PREFAULT_STEP_BYTES):
            if self._stop.is_set():
                return
            step = min(_PREFAULT_STEP_BYTES, self.ref.nbytes - start)
            if madvise(self._address + start, step, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code != errno.EINVAL:  # EINVAL: a kernel that can't; first use pays instead
                    self._warn(f"prefaulting stopped at {start} bytes: {os.strerror(code)}")
                return


def _attach_hint(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "run both processes as one user, and allow ptrace of it in containers"
    if isinstance(error, FileNotFoundError):
        return "the owner is gone, or runs in another PID namespace"
    return "check the limit on memory"
