"""The tiers below host, each beside a bare loop over the same bytes: Redis and files.

    python benchmarks/stores.py [--out build/bench.json] [--rounds 9] [--directory DIR]

Redis is a real server on TCP loopback; files are in DIR (a temporary directory).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from core import CHUNK, NAMESPACE, ArrayPages
from figures import Figure, interleave, median, save, show, spread, throughput

from lmcache_backend_redis.connector import RedisConnector, server_facts
from lmcache_backend_redis.server import RedisServer
from lmcache_backend_redis.sessions import Sessions
from lmcache_conformance import Memory, within
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.opening import open_engine
from lmcache_core.sdk import Status

MIB, GIB = 1 << 20, 1 << 30
SIZES = (("1MiB", MIB, 48), ("32MiB", 32 * MIB, 4))


class BareRedis:
    """RESP over one blocking socket: sendmsg out, recv_into in, nothing else."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.line = memoryview(bytearray(64))

    def header(self) -> bytes:
        while True:
            count = self.sock.recv_into(self.line, 64, socket.MSG_PEEK)
            end = bytes(self.line[:count]).find(b"\r\n")
            if end >= 0:
                self.sock.recv_into(self.line[: end + 2])
                return bytes(self.line[:end])

    def set(self, key: bytes, source: memoryview) -> None:
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(source))
        parts = [memoryview(head), source, memoryview(b"\r\n")]
        while parts:
            count = self.sock.sendmsg(parts)
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = parts[0][count:]
        assert self.header() == b"+OK"

    def get_into(self, key: bytes, target: memoryview) -> None:
        self.sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        nbytes, at = int(self.header()[1:]), 0
        while at < nbytes:
            at += self.sock.recv_into(target[at:nbytes], nbytes - at, socket.MSG_WAITALL)
        self.sock.recv(2, socket.MSG_WAITALL)


def redis_figures(rounds: int) -> list[Figure]:
    with RedisServer() as server:
        sessions = Sessions(server.url, {}, limit=4)
        store = RedisConnector(sessions, server_facts(sessions, within(5).deadline_s))
        figures = [redis_lookup(store, rounds)]
        for label, nbytes, count in SIZES:
            figures += redis_of_size(server, store, label, nbytes, count, rounds)
        store.close()
    return figures


def redis_lookup(store: RedisConnector, rounds: int) -> Figure:
    keys = [b"lookup-%d" % i + bytes(30) for i in range(256)]
    memory = Memory([16])
    for key in keys[:200]:
        store.put_from([key], memory.buffers(read_only=True), within(5))

    def ask() -> None:
        found = store.exists(keys[:128], within(5)) + store.exists(keys[128:], within(5))
        assert found.count(Status.OK) == 200

    times = interleave({"ours": ask}, rounds * 10)["ours"]
    return Figure(
        name="redis.lookup_256",
        value=median(times) * 1e3,
        unit="ms",
        limit=None,
        ratio=None,
        target=4.0,
        met=median(times) <= 4e-3,
        spread=spread(times),
        method="256 chunks in two round trips of 128, TCP loopback",
    )


def redis_of_size(
    server: RedisServer, store: RedisConnector, label: str, nbytes: int, count: int, rounds: int
) -> list[Figure]:
    import redis

    memory, bare = Memory([nbytes] * count), BareRedis(server.port)
    memory.array[:] = np.random.default_rng(0).integers(0, 255, len(memory.array), np.uint8)
    keys = [b"%d" % i for i in range(count)]
    sources, targets = memory.buffers(read_only=True), memory.buffers()
    client = redis.Redis(port=server.port)

    def ours_put() -> None:
        assert set(store.put_from(keys, sources, within(60))) == {Status.OK}

    def ours_get() -> None:
        results = store.get_into(keys, targets, within(60))
        assert {result.status for result in results} == {Status.OK}

    puts = {
        "ours": ours_put,
        "raw": lambda: [bare.set(b"r" + k, s.view) for k, s in zip(keys, sources)],
        "py": lambda: [client.set(b"p" + k, s.view) for k, s in zip(keys, sources)],
    }
    gets = {
        "ours": ours_get,
        "raw": lambda: [bare.get_into(b"r" + k, t.view) for k, t in zip(keys, targets)],
        "py": lambda: [client.get(b"p" + k) for k in keys],
    }
    method = "{} of {} values, one connection, over bare sendmsg/recv_into of whole values"
    times = interleave(puts, rounds, client.flushall)
    put = throughput(f"redis.put_{label}", nbytes * count, times, 0.80,
                     method.format("put", count), py="redis-py")  # fmt: skip
    client.flushall()
    for fill in puts.values():
        fill()
    times = interleave(gets, rounds)
    get = throughput(f"redis.get_{label}", nbytes * count, times, 0.80,
                     method.format("get", count), py="redis-py")  # fmt: skip
    client.flushall()
    return [put, get]


class BareFiles:
    """The same bytes, files and syncs, with nothing around them."""

    def __init__(self, directory: Path, sync: bool) -> None:
        self.directory, self.sync = directory, sync
        directory.mkdir()

    def write(self, names: list[str], values: list[memoryview]) -> None:
        for name, data in zip(names, values):
            path = f"{self.directory}/{name}"
            fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            at = 0
            while at < len(data):
                at += os.write(fd, data[at:])
            if self.sync:
                os.fsync(fd)
            os.close(fd)
            os.rename(path + ".tmp", path)
            if self.sync:
                folder = os.open(self.directory, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)

    def read(self, names: list[str], values: list[memoryview]) -> None:
        for name, target in zip(names, values):
            fd = os.open(f"{self.directory}/{name}", os.O_RDONLY)
            at = 0
            while at < len(target):
                at += os.readv(fd, [target[at:]])
            os.close(fd)


def drop_pages(directory: Path) -> None:
    """Out of the page cache, so that the next read comes from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def file_engine(directory: Path, durability: str, payload: int, count: int) -> CacheEngine:
    tier = TierConfig(
        url=f"file://{directory}?durability={durability}", deadline_s=60.0, negative_ttl_s=0.0
    )
    config = EngineConfig(
        host_bytes=(payload + 8192) * (count + 1),
        chunk_size=CHUNK,
        tiers=(tier,),
        lookup_deadline_s=60.0,
    )
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=payload, description=b"bench")
    engine = open_engine(config, layout=layout, namespace=NAMESPACE)
    engine.host.arena.wait_prefaulted(60)
    return engine


def file_figures(base: Path, rounds: int) -> list[Figure]:
    figures: list[Figure] = []
    for durability, label_durability in (("process", "none"), ("host", "host")):
        for label, payload, count in SIZES:
            room = Path(tempfile.mkdtemp(dir=base))
            figures += file_of_size(
                room, durability, f"{label}_{label_durability}", payload, count, rounds
            )
            shutil.rmtree(room)
    return figures


def file_of_size(
    room: Path, durability: str, label: str, payload: int, count: int, rounds: int
) -> list[Figure]:
    engine = file_engine(room / "ours", durability, payload, count)
    bare = BareFiles(room / "bare", durability == "host")
    nbytes = stored_bytes(payload)
    memory = np.random.default_rng(0).integers(0, 255, (count, nbytes), np.uint8)
    views = [memoryview(row) for row in memory]
    pages = ArrayPages(memory[:, :payload].copy())
    into = ArrayPages(np.zeros((count, payload), np.uint8))
    prompts = itertools.count()
    state: dict[str, Any] = {"tokens": [0], "names": ["none"], "chunks": []}

    def fresh() -> None:
        seed = next(prompts)
        engine.abort(state["chunks"])
        engine.clear(lower_tiers=True)
        engine.flush(60)
        settle(engine)
        for name in state["names"]:
            (bare.directory / name).unlink(missing_ok=True)
        state["tokens"] = list(range(seed, seed + CHUNK * count))
        state["names"] = [f"{seed}-{i}" for i in range(count)]
        state["chunks"] = [engine.reserve(key, None) for key in engine.keys(state["tokens"])]
        for index, chunk in enumerate(state["chunks"]):
            pages.offload(index, engine.host.payload(chunk))
        os.sync()

    def ours_store() -> None:
        engine.commit(state["chunks"])
        state["chunks"] = []
        assert engine.flush(60)

    def ours_read() -> None:
        assert engine.retrieve(state["tokens"], into) == CHUNK * count

    def cold() -> None:
        engine.clear()
        drop_pages(room)

    stores = {"ours": ours_store, "raw": lambda: bare.write(state["names"], views)}
    times = {"store": interleave(stores, rounds, fresh)}
    fresh()
    ours_store()
    bare.write(state["names"], views)
    reads = {"ours": ours_read, "raw": lambda: bare.read(state["names"], views)}
    times["cold_read"] = interleave(reads, rounds, cold)
    assert np.array_equal(into.data, pages.data)
    engine.close()
    what = {
        "store": "from host slots until acknowledged by the tier, checksum included",
        "cold_read": "retrieve with host and page cache empty, checksum included",
    }
    return [
        throughput(f"file.{op}_{label}", nbytes * count, t, 0.90,
                   f"{count} chunks, {what[op]}; over the same bytes, files and fsyncs written "
                   "bare by one thread")
        for op, t in times.items()
    ]  # fmt: skip


def settle(engine: CacheEngine) -> None:
    """Let deletes end."""
    while engine.tiers.readable[0]._calls.in_time:
        engine.runtime.wait(0.01)
        engine.poll()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", choices=("redis", "file"))
    args = parser.parse_args()
    parts: dict[str, Callable[[], list[Figure]]] = {
        "redis": lambda: redis_figures(args.rounds),
        "file": lambda: file_figures(args.directory, args.rounds),
    }
    save([f for name, part in parts.items() if args.only in (None, name) for f in part()], args.out)
    show(args.out)


if __name__ == "__main__":
    main()
