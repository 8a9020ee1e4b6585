"""Helpers of this package's tests."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache_backend_redis.connector import RedisConnector, server_facts
from lmcache_backend_redis.sessions import Sessions
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Host
from lmcache_core import plugins
from lmcache_core.sdk import GetResult, RemoteConnector, Status

Open = Callable[..., RedisConnector]


def connect(url: str, arguments: dict[str, Any] | None = None, **options: Any) -> RedisConnector:
    limit = options.setdefault("connections", 4)
    sessions = Sessions(url, arguments or {}, limit=limit)
    return RedisConnector(sessions, server_facts(sessions, time.monotonic() + 5), **options)


def open_url(url: str) -> RemoteConnector:
    """As an engine opens it."""
    return plugins.open_connector(url, Host(Path(tempfile.gettempdir())).services)


def put(store: RemoteConnector, key: bytes, content: bytes, seconds: float = 10) -> Status:
    memory = Memory([len(content)])
    memory.fill(0, content)
    return store.put_from([key], memory.buffers(read_only=True), within(seconds))[0]


def get(
    store: RemoteConnector, key: bytes, nbytes: int, seconds: float = 10
) -> tuple[GetResult, bytes]:
    memory = Memory([nbytes])
    result = store.get_into([key], memory.buffers(), within(seconds))[0]
    assert memory.canaries_intact()
    return result, memory.bytes_of(0)[: result.nbytes]
