"""``file:///absolute/directory``: one file a value; survives a restart.

``DIRECTORY/v1/XX/HEXKEY``, XX from the key's bytes.  A put writes ``DIRECTORY/v1/tmp/PID-N``
and renames it, so a name always stands for whole bytes; with ``durability=host`` file and
directory are synced first.  Files are 0600, directories 0700.
"""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from lmcache_core.fileops import FileOps, OsFileOps
from lmcache_core.sdk import (
    API_VERSION,
    AbandoningLoop,
    BackendInfo,
    Capabilities,
    ConfigError,
    Durability,
    Health,
    HostServices,
    OpContext,
    OptionSpec,
    Probe,
    ReleaseToken,
    RemoteConnector,
    ScanEntry,
    Sharing,
    TargetTooSmall,
    hookimpl,
)

_NAME = "file"
_HEX = "0123456789abcdef"


class FileConnector(AbandoningLoop):
    """Values as files below ``root``; thread-safe, also between processes.

    Args:
        root: absolute directory, made when absent.
        durability: ``process`` (survives our death) or ``host`` (synced: survives power loss).
        ops, clock: file primitives and time.
        released: see `AbandoningLoop`; without it calls may outlast their deadline.
        pid, is_alive: whose temporary files may be swept at start; for simulations.

    Raises:
        ConfigError: ``root`` can't be used.
    """

    def __init__(
        self,
        root: str,
        *,
        durability: str = "process",
        ops: FileOps | None = None,
        clock: Callable[[], float] = time.monotonic,
        pid: int | None = None,
        is_alive: Callable[[int], bool] | None = None,
        released: Callable[[ReleaseToken], None] | None = None,
    ) -> None:
        super().__init__(_NAME, clock=clock, released=released)
        self._ops: FileOps = ops or OsFileOps()
        self._sync = durability == "host"
        self._base = f"{root.rstrip('/')}/v1"
        self._tmp = f"{self._base}/tmp"
        self._is_alive = is_alive or _is_alive
        self._run = f"{os.getpid() if pid is None else pid}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._shards: set[str] = set()
        self._orphans: set[str] = set()
        self._shards_lock = threading.Lock()
        self.capabilities = _capabilities(durability)
        self._prepare(root)

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return self._ops.exists(self._path(key))

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        try:
            fd = self._ops.open(self._path(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            nbytes = self._ops.fd_size(fd)
            if nbytes > len(target):
                raise TargetTooSmall(nbytes)
            done = 0
            while done < nbytes:
                count = self._ops.pread_into(fd, target[done:nbytes], done)
                if count <= 0:
                    raise OSError(errno.EIO, "the file ended early")
                done += count
            return nbytes
        finally:
            self._ops.close(fd)

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        self._remove_orphans()
        shard = self._make_shard(key)
        temporary = f"{self._tmp}/{self._run}-{next(self._numbers)}"
        try:
            self._write(temporary, source)
            self._ops.rename(temporary, f"{shard}/{key.hex()}")
        except OSError:
            self._orphans.add(temporary)
            self._remove_orphans()
            raise
        if self._sync:
            self._ops.fsync_dir(shard)

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        self._remove_orphans()
        self._ops.unlink(self._path(key))

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``; foreign names are left out."""
        self.check_call((), "scan")
        wanted = prefix.hex()
        for shard in self._ops.scan(self._base):
            if not shard.is_dir or len(shard.name) != 2:
                continue
            for entry in self._ops.scan(f"{self._base}/{shard.name}"):
                name = entry.name
                if entry.is_dir or not name.startswith(wanted) or set(name) - set(_HEX):
                    continue
                if name and len(name) % 2 == 0:
                    yield ScanEntry(bytes.fromhex(name), entry.nbytes, entry.mtime_s)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        try:
            present = self._ops.exists(self._tmp)
        except OSError as error:
            return Health(ok=False, reason=str(error))
        return Health(ok=present, reason="" if present else f"{self._tmp} is gone")

    def _prepare(self, root: str) -> None:
        if not root.startswith("/"):
            raise ConfigError(
                f"{root!r} is not absolute", backend=_NAME, op="open", hint="file:///absolute/dir"
            )
        try:
            for folder in (root, self._base, self._tmp):
                self._ops.makedirs(folder, 0o700)
            trial = f"{self._tmp}/{self._run}-trial"
            self._write(trial, memoryview(b""))
            self._ops.unlink(trial)
            self._sweep()
        except OSError as error:
            raise ConfigError(
                f"{root} can't be used: {error.strerror or error}",
                backend=_NAME,
                op="open",
                hint="give a directory that this user can write, with free space",
            ) from error

    def _sweep(self) -> None:
        """Remove temporary files of processes that are gone."""
        for entry in list(self._ops.scan(self._tmp)):
            owner = entry.name.partition("-")[0]
            if not (owner.isdigit() and self._is_alive(int(owner))):
                self._orphans.add(f"{self._tmp}/{entry.name}")
        self._remove_orphans()

    def _write(self, path: str, source: memoryview) -> None:
        fd = self._ops.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            done = 0
            while done < len(source):
                done += self._ops.pwrite(fd, source[done:], done)
            if self._sync:
                self._ops.fsync(fd)
        finally:
            self._ops.close(fd)

    def _remove_orphans(self) -> None:
        """Remove temporary files that a failed put could not; their room is not counted.

        Raises:
            OSError: one can't be removed yet.
        """
        for path in list(self._orphans):
            try:
                self._ops.unlink(path)
            except FileNotFoundError:
                pass
            self._orphans.discard(path)

    def _shard(self, key: bytes) -> str:
        return f"{self._base}/{sum(key) & 0xFF:02x}"

    def _path(self, key: bytes) -> str:
        return f"{self._shard(key)}/{key.hex()}"

    def _make_shard(self, key: bytes) -> str:
        shard = self._shard(key)
        with self._shards_lock:
            if shard not in self._shards:
                self._ops.makedirs(shard, 0o700)
                if self._sync:
                    self._ops.fsync_dir(self._base)
                self._shards.add(shard)
        return shard


def _capabilities(durability: str) -> Capabilities:
    return Capabilities(
        max_concurrency=8,
        max_batch=128,
        max_value_bytes=1 << 40,
        scan=True,
        durability=Durability.HOST if durability == "host" else Durability.PROCESS,
        sharing=Sharing.HOST,
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _directory(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(
            f"{url!r} is not file:///absolute/directory",
            backend=_NAME,
            op="open",
            hint="write three slashes: file:///nvme/kv",
        )
    return unquote(parts.path)


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe ``file://``."""
    return BackendInfo(
        name=_NAME,
        version="0.9.0",
        schemes=(_NAME,),
        api_min=API_VERSION,
        api_tested=API_VERSION,
        options=(
            OptionSpec(
                name="durability",
                type=str,
                default="process",
                help="process: survives our death; host: synced, survives power loss",
                choices=("process", "host"),
            ),
        ),
        url_help="file:///absolute/directory",
        capabilities=_capabilities("process"),
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether the directory, or its nearest parent, can be written."""
    try:
        path = _directory(url)
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if os.path.isdir(path) and os.access(path, os.W_OK):
        return Probe(usable=True, reason=f"{path} can be written")
    return Probe(usable=False, reason=f"{path} can't be written", hint="choose another directory")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Open, and make the directory when absent."""
    return FileConnector(_directory(url), durability=options["durability"], released=host.released)
