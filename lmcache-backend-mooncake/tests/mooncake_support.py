"""Helpers of this package's tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmcache_backend_mooncake.connector import MooncakeConnector
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_backend_mooncake.settings import OPTIONS, Settings, read_settings
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Count, Host
from lmcache_core.sdk import GetResult, RemoteConnector, Status

DEFAULTS = {option.name: option.default for option in OPTIONS}


def settings(url: str, **options: Any) -> Settings:
    return read_settings(url, {**DEFAULTS, **options})


@dataclass
class Opened:
    """A connector, core's side of it, and what it counted."""

    store: MooncakeConnector
    host: Host
    counters: dict[str, Count] = field(default_factory=dict)


Open = Callable[..., Opened]


def connect(url: str, regions: tuple[Memory, ...] = (), **options: Any) -> Opened:
    found = [memory.region for memory in regions if memory.region is not None]
    host = Host(Path(tempfile.gettempdir()), found)
    counters: dict[str, Count] = {}
    object.__setattr__(host.services, "counter", lambda name: counters.setdefault(name, Count()))
    store = MooncakeConnector(settings(url, **options), host.services, time.monotonic() + 15)
    return Opened(store, host, counters)


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


def exists(store: RemoteConnector, key: bytes) -> Status:
    return store.exists([key], within(5))[0]


def until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


def helper_pid(opened: Opened) -> int:
    link = opened.store._supervisor._link
    assert link is not None
    return link.pid


BARE = """
import json, os, sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", sys.argv[1]) == 0
print(json.dumps((EXPRESSION), default=str), flush=True)
os._exit(0)
"""


def bare(server: MooncakeServer, expression: str) -> Any:
    """What the library itself says, in a process of its own."""
    master = server.url.removeprefix("mooncake://")
    done = subprocess.run(
        [sys.executable, "-c", BARE.replace("EXPRESSION", expression), master],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return json.loads(done.stdout)
