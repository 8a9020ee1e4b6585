"""`DirectOps`: file primitives that go around the page cache (O_DIRECT)."""

from __future__ import annotations

import errno
import fcntl
import os

from lmcache_core.sdk import OsFileOps

ALIGNMENT = 4096
"""Of addresses, sizes and offsets; what core pads to, and every device takes."""


class DirectOps(OsFileOps):
    """Like `OsFileOps`; files are opened with O_DIRECT.

    What is not aligned, the tail of a value that ``file://`` wrote, goes through the page cache.
    """

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """See `OsFileOps`; a file system without O_DIRECT is EINVAL."""
        try:
            return super().open(path, flags | os.O_DIRECT, mode)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise OSError(errno.EINVAL, "this file system has no O_DIRECT; use direct=0") from error

    def pread_into(self, fd: int, view: memoryview, offset: int) -> int:
        """See `OsFileOps`."""
        return super().pread_into(fd, self._part(fd, view, offset), offset)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        """See `OsFileOps`."""
        return super().pwrite(fd, self._part(fd, view, offset), offset)

    def _part(self, fd: int, view: memoryview, offset: int) -> memoryview:
        """What of ``view`` can go next; when it is not aligned, ``fd`` loses O_DIRECT for good."""
        aligned = len(view) // ALIGNMENT * ALIGNMENT
        if aligned and offset % ALIGNMENT == 0:
            return view[:aligned]
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        return view
