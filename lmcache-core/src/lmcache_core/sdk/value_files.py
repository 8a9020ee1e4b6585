"""`ValueFiles`: one file a value, the layout that ``file://`` and every store of plain files share.

``ROOT/v1/XX/HEXKEY``, XX the sum of the key's bytes.  A put writes ``ROOT/v1/tmp/PID-N`` and
renames it, so a name always stands for whole bytes.  Files are 0600, directories 0700.  How the
bytes get into a file is the connector's business: so each of them reads what another wrote.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit

from lmcache_core.sdk.connector import Health, ScanEntry
from lmcache_core.sdk.errors import ConfigError
from lmcache_core.sdk.fileops import FileOps, OsFileOps

_HEX = "0123456789abcdef"


class ValueFiles:
    """Names, publication and removal; thread-safe, also between processes.

    Args:
        root: absolute directory, made when absent.
        backend: for errors.
        sync: files and names are synced to the device before a value is published.
        ops: file primitives.
        pid: of this process, in the names of temporary files; for simulations.
        is_alive: whether a process is, whose temporary files are left alone; for simulations.

    Attributes:
        ops: as given.
        sync: as given.

    Raises:
        ConfigError: ``root`` can't be used.
    """

    def __init__(
        self,
        root: str,
        *,
        backend: str,
        sync: bool = False,
        ops: FileOps | None = None,
        pid: int | None = None,
        is_alive: Callable[[int], bool] | None = None,
    ) -> None:
        self.ops: FileOps = ops or OsFileOps()
        self.sync = sync
        self._backend = backend
        self._base = f"{root.rstrip('/')}/v1"
        self._tmp = f"{self._base}/tmp"
        self._is_alive = is_alive or _is_alive
        self._run = f"{os.getpid() if pid is None else pid}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._shards: set[str] = set()
        self._orphans: set[str] = set()
        self._shards_lock = threading.Lock()
        self._prepare(root)

    def path(self, key: bytes) -> str:
        """Where the value of ``key`` is, if it is anywhere."""
        return f"{self._shard(key)}/{key.hex()}"

    @contextlib.contextmanager
    def publishing(self, key: bytes) -> Iterator[str]:
        """A new path to write the value to; published when the block ends, removed when it raises.

        The writer makes the file (0600, ``O_EXCL``), and where `sync` is set syncs it.

        Raises:
            OSError: no room for names, or what the block raised.
        """
        self.remove_orphans()
        shard = self._make_shard(key)
        temporary = f"{self._tmp}/{self._run}-{next(self._numbers)}"
        try:
            yield temporary
            self.ops.rename(temporary, f"{shard}/{key.hex()}")
        except Exception:
            self._orphans.add(temporary)
            self.remove_orphans()
            raise
        if self.sync:
            self.ops.fsync_dir(shard)

    def delete(self, key: bytes) -> None:
        """Remove a value.

        Raises:
            FileNotFoundError: it is absent.
            OSError: it can't be removed.
        """
        self.remove_orphans()
        self.ops.unlink(self.path(key))

    def exists(self, key: bytes) -> bool:
        """Whether a value is there; other errors than ENOENT raise."""
        return self.ops.exists(self.path(key))

    def scan(self, prefix: bytes) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``; foreign names are left out."""
        wanted = prefix.hex()
        for shard in self.ops.scan(self._base):
            if not shard.is_dir or len(shard.name) != 2:
                continue
            for entry in self.ops.scan(f"{self._base}/{shard.name}"):
                name = entry.name
                if entry.is_dir or not name.startswith(wanted) or set(name) - set(_HEX):
                    continue
                if name and len(name) % 2 == 0:
                    yield ScanEntry(bytes.fromhex(name), entry.nbytes, entry.mtime_s)

    def health(self) -> Health:
        """Whether the directory is still there."""
        try:
            present = self.ops.exists(self._tmp)
        except OSError as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=present, reason="" if present else f"{self._tmp} is gone")

    def read(self, path: str, target: memoryview) -> int:
        """Read a file into the start of ``target`` with plain reads; its size, which may be more
        than ``target`` holds: then nothing was read.

        Raises:
            OSError: as the system calls do; EIO when the file is shorter than its size says.
        """
        fd = self.ops.open(path, os.O_RDONLY)
        try:
            nbytes = self.ops.fd_size(fd)
            done = 0
            while nbytes <= len(target) and done < nbytes:
                count = self.ops.pread_into(fd, target[done:nbytes], done)
                if count <= 0:
                    raise OSError(errno.EIO, "the file ended early")
                done += count
            return nbytes
        finally:
            self.ops.close(fd)

    def write(self, path: str, source: memoryview) -> None:
        """Make a file of ``source`` with plain writes, synced where `sync` is set."""
        fd = self.ops.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            done = 0
            while done < len(source):
                done += self.ops.pwrite(fd, source[done:], done)
            if self.sync:
                self.ops.fsync(fd)
        finally:
            self.ops.close(fd)

    def remove_orphans(self) -> None:
        """Remove temporary files that a failed put could not; their room is not counted.

        Raises:
            OSError: one can't be removed yet.
        """
        for path in list(self._orphans):
            try:
                self.ops.unlink(path)
            except FileNotFoundError:
                pass
            self._orphans.discard(path)

    def _prepare(self, root: str) -> None:
        if not root.startswith("/"):
            raise ConfigError(
                f"{root!r} is not absolute",
                backend=self._backend,
                op="open",
                hint=f"{self._backend}:///absolute/dir",
            )
        try:
            for folder in (root, self._base, self._tmp):
                self.ops.makedirs(folder, 0o700)
            trial = f"{self._tmp}/{self._run}-trial"
            self.write(trial, memoryview(b""))
            self.ops.unlink(trial)
            self._sweep()
        except OSError as error:
            raise ConfigError(
                f"{root} can't be used: {error.strerror or error}",
                backend=self._backend,
                op="open",
                hint="give a directory that this user can write, with free space",
            ) from error

    def _sweep(self) -> None:
        """Remove temporary files of processes that are gone."""
        for entry in list(self.ops.scan(self._tmp)):
            owner = entry.name.partition("-")[0]
            if not (owner.isdigit() and self._is_alive(int(owner))):
                self._orphans.add(f"{self._tmp}/{entry.name}")
        self.remove_orphans()

    def _shard(self, key: bytes) -> str:
        return f"{self._base}/{sum(key) & 0xFF:02x}"

    def _make_shard(self, key: bytes) -> str:
        shard = self._shard(key)
        with self._shards_lock:
            if shard not in self._shards:
                self.ops.makedirs(shard, 0o700)
                if self.sync:
                    self.ops.fsync_dir(self._base)
                self._shards.add(shard)
        return shard


def directory_of(url: str, backend: str) -> str:
    """The directory that ``scheme:///absolute/directory`` names.

    Raises:
        ConfigError: it names none.
    """
    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(
            f"{url!r} is not {backend}:///absolute/directory",
            backend=backend,
            op="open",
            hint=f"write three slashes: {backend}:///nvme/kv",
        )
    return unquote(parts.path)


def writable(path: str) -> bool:
    """Whether ``path``, or where it is absent its nearest parent, is a directory to write to."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
