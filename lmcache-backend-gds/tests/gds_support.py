"""Helpers of this package's tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lmcache_backend_gds.connector import GdsConnector
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Host, entry_points_of
from lmcache_core import plugins
from lmcache_core.sdk import GetResult, RemoteConnector, Status

KIB, MIB = 1 << 10, 1 << 20

needs_kvikio = pytest.mark.skipif(
    importlib.util.find_spec("kvikio") is None,
    reason="kvikio is not installed here; README.md has the lean line",
)


def open_url(url: str, host: Host) -> GdsConnector:
    opened = plugins.open_connector(url, host.services, entry_points_of(url, ""))
    assert isinstance(opened, GdsConnector)
    return opened


def put(store: RemoteConnector, key: bytes, content: bytes, seconds: float = 10) -> Status:
    memory = Memory.of([content])
    return store.put_from([key], memory.buffers(read_only=True), within(seconds))[0]


def get(
    store: RemoteConnector, key: bytes, nbytes: int, seconds: float = 10
) -> tuple[GetResult, bytes]:
    memory = Memory([nbytes])
    result = store.get_into([key], memory.buffers(), within(seconds))[0]
    assert memory.canaries_intact()
    return result, memory.bytes_of(0)[: result.nbytes]


def file_of(root: Path, key: bytes) -> Path:
    """Where the layout that is shared with ``file://`` keeps a value."""
    return root / "v1" / f"{sum(key) & 0xFF:02x}" / key.hex()


def values_below(root: Path) -> list[Any]:
    """Every file, temporary ones too."""
    return [each for each in root.rglob("*") if each.is_file()]
