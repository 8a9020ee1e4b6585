"""``memory://``: a dict in this process.  For tests, and as the smallest example."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from lmcache_core.sdk import (
    API_VERSION,
    BackendInfo,
    BatchLoop,
    Capabilities,
    ConfigError,
    Health,
    HostServices,
    OpContext,
    OptionSpec,
    Probe,
    RemoteConnector,
    ScanEntry,
    Sharing,
    TargetTooSmall,
    hookimpl,
)


class MemoryConnector(BatchLoop):
    """Every open is a store of its own; ``size_bytes`` 0 is unbounded."""

    capabilities = Capabilities(
        max_concurrency=16,
        max_batch=128,
        scan=True,
        capacity_reported=True,
        sharing=Sharing.PROCESS,
    )

    def __init__(self, size_bytes: int = 0) -> None:
        super().__init__("memory")
        self._size_bytes = size_bytes
        self._used_bytes = 0
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return key in self._values

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if len(value) > len(target):
            raise TargetTooSmall(len(value))
        target[: len(value)] = value
        return len(value)

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        value = bytes(source)
        with self._lock:
            used = self._used_bytes - len(self._values.get(key, b"")) + len(value)
            if self._size_bytes and used > self._size_bytes:
                raise OSError(28, "the store is full")
            self._values[key] = value
            self._used_bytes = used

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        with self._lock:
            self._used_bytes -= len(self._values.pop(key, b""))

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every key that starts with ``prefix``."""
        self.check_call((), "scan")
        with self._lock:
            found = [(k, len(v)) for k, v in self._values.items() if k.startswith(prefix)]
        for key, nbytes in found:
            yield ScanEntry(key, nbytes)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        return Health(ok=True, used_bytes=self._used_bytes, total_bytes=self._size_bytes or -1)

    def close_resources(self) -> None:
        self._values.clear()


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe ``memory://``."""
    return BackendInfo(
        name="memory",
        version="0.9.0",
        schemes=("memory",),
        api_min=API_VERSION,
        api_tested=API_VERSION,
        options=(OptionSpec(name="size", type=int, default=0, unit="bytes", help="0: unbounded"),),
        url_help="memory://",
        capabilities=MemoryConnector.capabilities,
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Always usable."""
    return Probe(usable=True, reason="memory of this process")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """A new, empty store."""
    if options["size"] < 0:
        raise ConfigError("size is negative", backend="memory", op="open", hint="0: unbounded")
    return MemoryConnector(options["size"])
