"""``file:///absolute/directory``: one file a value (`ValueFiles`), moved with plain system calls;
survives a restart.  With ``durability=host`` file and name are synced before a put answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lmcache_core.sdk import (
    API_VERSION,
    AbandoningLoop,
    BackendInfo,
    Capabilities,
    ConfigError,
    Durability,
    FileOps,
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
    ValueFiles,
    directory_of,
    hookimpl,
    writable,
)

_NAME = "file"


class FileConnector(AbandoningLoop):
    """Values as files below ``root``; thread-safe, also between processes.

    Args:
        root: absolute directory, made when absent.
        durability: ``process`` (survives our death) or ``host`` (synced: survives power loss).
        ops, clock: file primitives and time.
        released: see `AbandoningLoop`; without it calls may outlast their deadline.
        pid, is_alive: see `ValueFiles`.

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
        self.capabilities = _capabilities(durability)
        self._files = ValueFiles(
            root, backend=_NAME, sync=durability == "host", ops=ops, pid=pid, is_alive=is_alive
        )

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return self._files.exists(key)

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        try:
            nbytes = self._files.read(self._files.path(key), target)
        except FileNotFoundError:
            return None
        if nbytes > len(target):
            raise TargetTooSmall(nbytes)
        return nbytes

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        with self._files.publishing(key) as path:
            self._files.write(path, source)

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        self._files.delete(key)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``; foreign names are left out."""
        self.check_call((), "scan")
        return self._files.scan(prefix)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        return self._files.health()


def _capabilities(durability: str) -> Capabilities:
    return Capabilities(
        max_concurrency=8,
        max_batch=128,
        max_value_bytes=1 << 40,
        scan=True,
        durability=Durability.HOST if durability == "host" else Durability.PROCESS,
        sharing=Sharing.HOST,
    )


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
        path = directory_of(url, _NAME)
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    if writable(path):
        return Probe(usable=True, reason=f"{path} can be written")
    return Probe(usable=False, reason=f"{path} can't be written", hint="choose another directory")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Open, and make the directory when absent."""
    return FileConnector(
        directory_of(url, _NAME), durability=options["durability"], released=host.released
    )
