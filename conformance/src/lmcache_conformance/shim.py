"""The I/O fault shim from Python: built once with the C compiler, steered through shared memory."""

from __future__ import annotations

import enum
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from lmcache_conformance.frame import Inconclusive

SOURCE = Path(__file__).with_name("shim.c")
KINDS = ("read", "write", "sync", "open", "connect", "send", "recv", "name", "socket")
NETWORK = ("connect", "send", "recv", "socket")
EVERY = (1 << len(KINDS)) - 1
_FIELDS = struct.Struct("8i9i")


class Action(enum.IntEnum):
    """What happens at the call that is meant."""

    COUNT = 0
    ERRNO = 1
    KILL = 2
    STALL = 3


def built() -> Path:
    """The shared library, compiled at first use; named by its source's hash.

    Raises:
        Inconclusive: no C compiler.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lmcache-conformance-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Inconclusive(f"{folder} belongs to another user")
    library = folder / f"shim-{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Inconclusive("I/O faults need a C compiler: apt-get install gcc")
    fresh = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(fresh), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Inconclusive(f"the I/O fault shim does not compile: {done.stderr[-300:]}")
    fresh.rename(library)
    return library


def mask_of(*kinds: str) -> int:
    """Bits of these kinds."""
    return sum(1 << KINDS.index(kind) for kind in kinds)


class Control:
    """The page that steers the shim of one process.

    Args:
        path: of the page; made when absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("a+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def arm(
        self,
        action: Action,
        *,
        at: int = 0,
        error: int = 0,
        mask: int = EVERY,
        stall_ms: int = 0,
    ) -> None:
        """Count calls of ``mask`` from now on; act at the ``at``-th, or at each when 0."""
        _FIELDS.pack_into(self._page, 0, 1, action, error, at, mask, 0, 0, stall_ms, *[0] * 9)

    def disarm(self) -> None:
        """Let everything pass."""
        struct.pack_into("i", self._page, 0, 0)

    def seen(self) -> dict[str, int]:
        """Calls since it was armed, by kind."""
        return dict(zip(KINDS, _FIELDS.unpack_from(self._page, 0)[8:]))

    @property
    def fired(self) -> int:
        """How often it acted since it was armed."""
        return int(_FIELDS.unpack_from(self._page, 0)[6])
