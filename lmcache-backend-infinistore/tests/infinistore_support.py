"""Helpers of this package's tests."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmcache_backend_infinistore.connector import InfinistoreConnector
from lmcache_conformance import Memory, within
from lmcache_conformance.rig import Host
from lmcache_core import plugins
from lmcache_core.sdk import GetResult, Region, Status

GRACE_S = 0.25
MIB = 1 << 20


class Opened:
    """A connector, opened as an engine opens it.

    Attributes:
        store, host: it, and core's side.
        counts: of its counters.
    """

    store: InfinistoreConnector

    def __init__(self, url: str, scratch: Path, regions: Sequence[Region] = ()) -> None:
        self.host = Host(scratch, regions)
        self.counts: Counter[str] = Counter()
        services = replace(self.host.services, counter=lambda name: _Count(self.counts, name))
        store = plugins.open_connector(url, services)
        assert isinstance(store, InfinistoreConnector)
        self.store = store

    def put(self, key: bytes, content: bytes, seconds: float = 10) -> Status:
        memory = Memory.of([content])
        return self.store.put_from([key], memory.buffers(read_only=True), within(seconds))[0]

    def get(self, key: bytes, nbytes: int, seconds: float = 10) -> tuple[GetResult, bytes]:
        memory = Memory([nbytes])
        result = self.store.get_into([key], memory.buffers(), within(seconds))[0]
        assert memory.canaries_intact()
        return result, memory.bytes_of(0, result.nbytes) if result.status is Status.OK else b""


class _Count:
    def __init__(self, counts: Counter[str], name: str) -> None:
        self._counts, self._name = counts, name

    def inc(self, amount: int = 1) -> None:
        self._counts[self._name] += amount


Open = Callable[..., Opened]


def helpers_of(pid: int) -> list[int]:
    """Processes that ``pid`` has started as helpers and that live."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if int(stat[1]) == pid and stat[0] != "Z" and b"infinistore.helper" in line:
                found.append(int(name))
    return found


def alive(pid: int) -> bool:
    """Whether it runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], object], limit_s: float = 30.0) -> None:
    """Wait until ``holds()``; fail after ``limit_s``."""
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, "it does not come true"
        time.sleep(0.02)
