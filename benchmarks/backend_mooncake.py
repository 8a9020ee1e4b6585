"""Mooncake: our connector beside the same library called bare, in one run.

    python benchmarks/backend_mooncake.py [--out build/bench.json] [--rounds 9]

A real master and a process that lends memory, over TCP in a network of their own.  Bare is the
library in a process of its own, as ours is, told what to do over a pipe and timed by itself:
``batch_put_from`` and ``batch_get_into`` on registered memory.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from figures import Figure, save, show, throughput

from lmcache_backend_mooncake.connector import MooncakeConnector
from lmcache_backend_mooncake.network import private_network
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance import Memory, within
from lmcache_core.sdk import HostServices, RemoteConnector, Status

MIB = 1 << 20
SIZES = (("1MiB", MIB, 32), ("32MiB", 32 * MIB, 4))
TARGET = 0.90
TURNS = 3
"""Two processes of the same program differ by a tenth for as long as they live, ours and bare ones
alike, so there are several of each."""

_BARE = """
import json, mmap, sys, time, ctypes
from mooncake.store import MooncakeDistributedStore
master, nbytes, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master) == 0
memory = mmap.mmap(-1, nbytes * count)
memory.write(bytes(range(256)) * (nbytes * count // 256))
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert store.register_buffer(base, nbytes * count) == 0
at, sizes = [base + i * nbytes for i in range(count)], [nbytes] * count
keys = ["bare-%d" % i for i in range(count)]
for line in sys.stdin:
    start = time.perf_counter()
    if line == "put\\n":
        answers, due = store.batch_put_from(keys, at, sizes), [0] * count
    elif line == "get\\n":
        answers, due = store.batch_get_into(keys, at, sizes), sizes
    else:
        answers = due = store.batch_remove(keys, True)
    seconds = time.perf_counter() - start
    assert answers == due, answers
    print(seconds, flush=True)
"""


class Bare:
    """The library in a process of its own."""

    def __init__(self, master: str, nbytes: int, count: int) -> None:
        command = [sys.executable, "-c", _BARE, master, str(nbytes), str(count)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def do(self, op: str) -> float:
        """Seconds that the library took, without our pipe."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(op + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class Nothing:
    def inc(self, amount: int = 1) -> None:
        return


def host(memory: Memory) -> HostServices:
    assert memory.region is not None
    return HostServices(
        logger=logging.getLogger("bench"),
        counter=lambda name: Nothing(),
        clock=time.monotonic,
        tmp_dir=Path(tempfile.gettempdir()),
        regions=lambda: (memory.region,),  # type: ignore[arg-type, return-value]
        on_region_added=lambda call: None,
        on_region_removed=lambda call: None,
        released=lambda token: None,
    )


Times = dict[str, dict[str, list[float]]]


def times_of(server: MooncakeServer, nbytes: int, count: int, rounds: int) -> Times:
    """Seconds of put and get in each round, by processes of their own."""
    memory = Memory([nbytes] * count, region_id=1)
    memory.array[:] = np.random.default_rng(0).integers(0, 255, len(memory.array), np.uint8)
    store = open_store(server, memory)
    bare = Bare(server.url.removeprefix("mooncake://"), nbytes, count)
    keys = [b"%d" % i for i in range(count)]
    sources, targets = memory.buffers(read_only=True), memory.buffers()

    def put() -> float:
        start = time.perf_counter()
        answers = store.put_from(keys, sources, within(60))
        seconds = time.perf_counter() - start
        assert set(answers) == {Status.OK}, answers
        return seconds

    def get() -> float:
        start = time.perf_counter()
        results = store.get_into(keys, targets, within(60))
        seconds = time.perf_counter() - start
        assert {result.status for result in results} == {Status.OK}, results
        return seconds

    def empty() -> None:
        store.delete(keys, within(60))
        bare.do("delete")

    times: Times = {op: {"ours": [], "raw": []} for op in ("put", "get")}
    runs: dict[str, dict[str, Callable[[], float]]] = {
        "put": {"ours": put, "raw": lambda: bare.do("put")},
        "get": {"ours": get, "raw": lambda: bare.do("get")},
    }
    for round_ in range(rounds + 1):
        for op in ("put", "get"):
            for who in ("ours", "raw") if round_ % 2 else ("raw", "ours"):
                seconds = runs[op][who]()
                # The first round touches the lent memory for the first time.
                if round_:
                    times[op][who].append(seconds)
        empty()
    bare.close()
    store.close()
    return times


def of_size(
    server: MooncakeServer, label: str, nbytes: int, count: int, rounds: int
) -> list[Figure]:
    """Figures of put and get, out of `TURNS` times so many rounds."""
    turns = [times_of(server, nbytes, count, rounds) for _ in range(TURNS)]
    times = {
        op: {run: [s for turn in turns for s in turn[op][run]] for run in ("ours", "raw")}
        for op in ("put", "get")
    }
    method = f"{{}} of {count} values a call, TCP loopback, over bare {{}} of the same batch"
    return [
        throughput(f"mooncake.put_{label}", nbytes * count, times["put"], TARGET,
                   method.format("put", "batch_put_from")),
        throughput(f"mooncake.get_{label}", nbytes * count, times["get"], TARGET,
                   method.format("get", "batch_get_into")),
    ]  # fmt: skip


def open_store(server: MooncakeServer, memory: Memory) -> RemoteConnector:
    from lmcache_backend_mooncake.settings import OPTIONS, read_settings

    settings = read_settings(server.url, {option.name: option.default for option in OPTIONS})
    return MooncakeConnector(settings, host(memory), time.monotonic() + 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with private_network(), MooncakeServer(segment_bytes=1 << 30) as server:
        figures = [
            f
            for label, nbytes, count in SIZES
            for f in of_size(server, label, nbytes, count, given.rounds)
        ]
    save(figures, given.out)
    show(given.out)


if __name__ == "__main__":
    main()
