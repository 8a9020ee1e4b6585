"""Helpers of this package's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache_conformance import Memory, value, within
from lmcache_conformance.rig import Host
from lmcache_core import plugins
from lmcache_core.sdk import GetResult, RemoteConnector, Status


def open_url(url: str, host: Host) -> Any:
    """As an engine opens it."""
    return plugins.open_connector(url, host.services)


def put(store: RemoteConnector, keys: list[bytes], size: int, seconds: float = 10) -> list[Status]:
    memory = Memory.of([value(sum(key), size) for key in keys])
    return store.put_from(keys, memory.buffers(read_only=True), within(seconds))


def get(
    store: RemoteConnector, key: bytes, nbytes: int, seconds: float = 10
) -> tuple[GetResult, bytes]:
    memory = Memory([nbytes])
    result = store.get_into([key], memory.buffers(), within(seconds))[0]
    assert memory.canaries_intact()
    return result, memory.bytes_of(0)[: result.nbytes]


def host_in(folder: Path) -> Host:
    return Host(folder)
