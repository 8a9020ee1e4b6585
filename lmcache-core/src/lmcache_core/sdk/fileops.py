"""The file primitives that the file connector uses, so that a test can put a simulated
disk, or a fault at any call, under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One name in a directory; ``mtime_s`` in seconds since the epoch."""

    name: str
    is_dir: bool
    nbytes: int
    mtime_s: float


class FileOps(Protocol):
    """Each raises OSError like the system call of its name; thread-safe."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int: ...
    def pread_into(self, fd: int, view: memoryview, offset: int) -> int: ...
    def pwrite(self, fd: int, view: memoryview, offset: int) -> int: ...
    def fsync(self, fd: int) -> None: ...
    def fsync_dir(self, path: str) -> None: ...
    def fd_size(self, fd: int) -> int: ...
    def close(self, fd: int) -> None: ...
    def rename(self, src: str, dst: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def makedirs(self, path: str, mode: int = 0o700) -> None: ...
    def exists(self, path: str) -> bool: ...
    def utime(self, path: str) -> None: ...
    def scan(self, path: str) -> Iterator[FileEntry]: ...


class OsFileOps:
    """The real file system."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A new file descriptor, not inherited by children."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def pread_into(self, fd: int, view: memoryview, offset: int) -> int:
        """Read to the start of ``view``; how many bytes came, 0 at the end."""
        return os.preadv(fd, [view], offset)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        """Write from the start of ``view``; how many bytes went."""
        return os.pwrite(fd, view, offset)

    def fsync(self, fd: int) -> None:
        """Data and what is needed to read it are on the device."""
        os.fdatasync(fd)

    def fsync_dir(self, path: str) -> None:
        """The directory's names are on the device."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def fd_size(self, fd: int) -> int:
        """Size of an open file in bytes."""
        return os.fstat(fd).st_size

    def close(self, fd: int) -> None:
        """Give the descriptor back."""
        os.close(fd)

    def rename(self, src: str, dst: str) -> None:
        """Atomically, over what is there."""
        os.replace(src, dst)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def makedirs(self, path: str, mode: int = 0o700) -> None:
        """Make a directory and its parents; present is fine."""
        os.makedirs(path, mode, exist_ok=True)

    def exists(self, path: str) -> bool:
        """Whether the name is there; other errors than ENOENT raise."""
        try:
            os.stat(path)
        except FileNotFoundError:
            return False
        return True

    def utime(self, path: str) -> None:
        """Set the time of modification to now."""
        os.utime(path)

    def scan(self, path: str) -> Iterator[FileEntry]:
        """Names in a directory; one that vanishes meanwhile is left out."""
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                is_dir = entry.is_dir(follow_symlinks=False)
                yield FileEntry(entry.name, is_dir, stat.st_size, stat.st_mtime)
