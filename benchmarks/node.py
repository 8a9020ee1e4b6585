"""The node server beside the embedded cache: the same chunks through both, interleaved.

python benchmarks/node.py [--out build/bench.json] [--rounds 15]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, interleave, median, paired_ratio, save, show, spread, throughput

from lmcache_core.cache import Attached, Cache, EmbeddedCache, Refusal, Wanted
from lmcache_core.config import EngineConfig, from_mapping
from lmcache_core.envelope import HEADER_BYTES, stored_bytes
from lmcache_core.keys import ChunkHasher, Namespace, key_suffix
from lmcache_core.layout import ChunkLayout
from lmcache_core.node.client import connect
from lmcache_core.opening import open_chunks

CHUNK, TOKENS = 256, 32_768
CHUNKS = TOKENS // CHUNK
SIZES = (("3MiB", 3 << 20, 128), ("32MiB", 32 << 20, 16))
"""12 KiB a token, as of a model of half a billion parameters, and 128 KiB, of eight billion."""
CLIENTS, LOOKUPS = 64, 150
PROCESSES = 4


@dataclass
class Side:
    """One cache with its memory mapped."""

    cache: Cache
    attached: Attached

    def payload(self, offset: int) -> np.ndarray:
        start = offset + HEADER_BYTES
        return self.attached.arena.array[start : start + self.cache.layouts[0].payload_bytes]

    def lookup(self, keys: Sequence[bytes]) -> None:
        ticket = self.cache.prefetch(keys)
        while not ticket.done:
            self.cache.wait(1.0)
            self.cache.poll()
        assert len(ticket.hits()) == len(keys)
        self.cache.release(ticket)

    def store(self, keys: Sequence[bytes], pages: np.ndarray) -> None:
        wanted = [Wanted(key, keys[i - 1] if i else None) for i, key in enumerate(keys)]
        slots = [s for s in self.cache.reserve(wanted) if not isinstance(s, Refusal)]
        assert len(slots) == len(keys)
        for slot, page in zip(slots, pages):
            np.copyto(self.payload(slot.offset), page)
        self.cache.commit(slots)
        self.cache.poll()

    def retrieve(self, keys: Sequence[bytes], pages: np.ndarray) -> None:
        ticket = self.cache.prefetch(keys)
        while not ticket.done:
            self.cache.wait(1.0)
            self.cache.poll()
        for slot, page in zip(ticket.hits(), pages):
            np.copyto(page, self.payload(slot.offset))
        self.cache.release(ticket)
        self.cache.poll()


def settings(payload_bytes: int, chunks: int, **more: Any) -> EngineConfig:
    return from_mapping(
        {"host_bytes": stored_bytes(payload_bytes) * (chunks + 2), "max_session_bytes": 1 << 40}
        | more
    )


@contextlib.contextmanager
def serving(config: EngineConfig) -> Iterator[tuple[str, int]]:
    """``lmc serve`` with this host tier; its socket and pid."""
    with tempfile.TemporaryDirectory() as directory:
        socket = f"{directory}/node.sock"
        environ = {
            **os.environ,
            "LMCACHE_HOST_BYTES": str(config.host_bytes),
            "LMCACHE_MAX_SESSION_BYTES": str(config.max_session_bytes),
        }
        command = [sys.executable, "-m", "lmcache_core.cli", "serve", "--socket", socket]
        server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline()
        try:
            yield socket, server.pid
        finally:
            server.terminate()
            server.wait(30)


@contextlib.contextmanager
def both(payload_bytes: int, chunks: int) -> Iterator[dict[str, Side]]:
    """The node server's cache and an embedded one, of one size."""
    config = settings(payload_bytes, chunks)
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=payload_bytes, description=b"bench")
    with serving(config) as (socket, _):
        node = connect(
            settings(payload_bytes, chunks, node=socket, node_reply_timeout_s=5), [layout]
        )
        embedded = EmbeddedCache(open_chunks(config), [layout])
        sides = {
            name: Side(cache, cache.handle.attach(warn=print, prefault=True))
            for name, cache in (("ours", node), ("raw", embedded))
        }
        for side in sides.values():
            side.attached.arena.wait_prefaulted(60)
        yield sides
        sides["ours"].attached.release()
        for side in sides.values():
            side.cache.close()


def keys_of(seed: int, count: int) -> list[bytes]:
    hasher = ChunkHasher(Namespace.of({"model": f"bench {seed}"}), chunk_size=1)
    tag, suffix = hasher.namespace.tag, key_suffix(0, 0)
    return [tag + digest + suffix for digest in hasher.digests(range(count))]


def lookup(rounds: int) -> list[Figure]:
    keys = keys_of(1, CHUNKS)
    hasher = ChunkHasher(Namespace.of({"model": "bench"}), chunk_size=CHUNK)
    tokens = list(range(TOKENS))
    pages = np.zeros((CHUNKS, 4096), np.uint8)
    with both(4096, CHUNKS) as sides:
        for side in sides.values():
            side.store(keys, pages)
        node, embedded = sides["ours"], sides["raw"]
        bare = interleave({n: lambda s=s: s.lookup(keys) for n, s in sides.items()}, rounds * 20)

        def whole(side: Side) -> None:
            hasher.digests(tokens)
            side.lookup(keys)

        hashed = interleave({n: lambda s=s: whole(s) for n, s in sides.items()}, rounds * 8)
        idle = interleave({"node": node.cache.poll, "embedded": embedded.cache.poll}, 500)
    figures = []
    for name, seconds, method in (
        ("node.lookup_32k", hashed, "32k tokens from a list: hashing, prefetch, hits, release"),
        ("node.lookup_keys_128", bare, "the same without hashing"),
    ):
        ratio = paired_ratio(seconds["ours"], seconds["raw"])
        figures.append(
            Figure(
                name, median(seconds["ours"]) * 1e6, "us", median(seconds["raw"]) * 1e6, ratio,
                2.0, ratio <= 2.0, spread(seconds["ours"]),
                f"{method}; 128 resident chunks, time over the embedded cache's",
            )
        )  # fmt: skip
    us = median(idle["node"]) * 1e6
    figures.append(
        Figure("node.idle_step", us, "us", median(idle["embedded"]) * 1e6, None, 50.0, us <= 50.0,
               spread(idle["node"]), "poll with nothing to do, beside the embedded cache's")
    )  # fmt: skip
    return figures


def copies(rounds: int) -> list[Figure]:
    figures = []
    for label, payload, chunks in SIZES:
        source = np.random.default_rng(0).integers(0, 255, (chunks, payload), np.uint8)
        target = np.ones((chunks, payload), np.uint8)
        keys = keys_of(2, chunks)
        with both(payload, chunks) as sides:

            def empty(sides: dict[str, Side] = sides, keys: list[bytes] = keys) -> None:
                for side in sides.values():
                    side.cache.forget(keys)
                    side.lookup([])

            runs = {n: lambda s=s: s.store(keys, source) for n, s in sides.items()}
            seconds = {"store": interleave(runs, rounds, empty)}
            empty()
            for side in sides.values():
                side.store(keys, source)
            runs = {n: lambda s=s: s.retrieve(keys, target) for n, s in sides.items()}
            seconds["retrieve"] = interleave(runs, rounds)
            assert np.array_equal(source, target)
        figures += [
            throughput(
                f"node.{op}_{label}", chunks * payload, times, 0.95,
                f"{chunks} chunks through NodeCache, speed over the embedded cache's",
            )
            for op, times in seconds.items()
        ]  # fmt: skip
    return figures


def crowd(socket: str, clients: int, lookups: int, results: Any) -> None:
    """One process of many clients, each with one lookup under way at any time: the seconds of
    every lookup."""
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=4096, description=b"bench")
    config = settings(4096, CHUNKS, node=socket, node_reply_timeout_s=5)
    caches = [connect(config, [layout]) for _ in range(clients)]
    keys = keys_of(1, CHUNKS)
    left = [lookups] * clients
    seconds: list[float] = []
    results.put(None)
    tickets = [(cache.prefetch(keys), time.perf_counter()) for cache in caches]
    while any(left):
        caches[min(i for i, n in enumerate(left) if n)].wait(0.05)
        for i, cache in enumerate(caches):
            cache.poll()
            ticket, start = tickets[i]
            if left[i] and ticket.done:
                seconds.append(time.perf_counter() - start)
                assert len(ticket.hits()) == len(keys)
                cache.release(ticket)
                left[i] -= 1
                tickets[i] = (cache.prefetch(keys if left[i] else []), time.perf_counter())
    for cache in caches:
        cache.close()
    results.put(seconds)


def private_bytes(pid: int) -> int:
    """Memory of its own, without the arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def concurrent() -> list[Figure]:
    context = multiprocessing.get_context("spawn")
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=4096, description=b"bench")
    config = settings(4096, CHUNKS)
    rounds: list[list[float]] = []
    resident: list[int] = []
    with serving(config) as (socket, pid):
        cache = connect(settings(4096, CHUNKS, node=socket, node_reply_timeout_s=5), [layout])
        side = Side(cache, cache.handle.attach(warn=print, prefault=False))
        side.store(keys_of(1, CHUNKS), np.zeros((CHUNKS, 4096), np.uint8))
        for _ in range(4):
            results = context.Queue()
            work = (socket, CLIENTS // PROCESSES, LOOKUPS, results)
            processes = [context.Process(target=crowd, args=work) for _ in range(PROCESSES)]
            for process in processes:
                process.start()
            found = [results.get(timeout=120) for _ in range(2 * PROCESSES)]
            for process in processes:
                process.join(60)
            rounds.append(sorted(s for seconds in found if seconds for s in seconds))
            resident.append(private_bytes(pid))
        side.attached.release()
        cache.close()
    ratios = [seconds[len(seconds) * 99 // 100] / median(seconds) for seconds in rounds]
    grown = (resident[-1] - resident[0]) / (1 << 20)
    ratio = statistics.median(ratios)
    return [
        Figure(
            "node.concurrent_64", median(rounds[-1]) * 1e3, "ms", None, ratio, 10.0, ratio < 10,
            spread(ratios),
            f"median lookup of 128 chunks, {CLIENTS} clients in {PROCESSES} processes, each with one "
            "under way; ratio is p99 over p50",
        ),
        Figure(
            "node.growth", grown, "MiB", None, None, 4.0, grown <= 4.0, 0.0,
            f"server's private memory after {len(rounds) * CLIENTS * LOOKUPS} lookups, over that "
            f"after {CLIENTS * LOOKUPS}",
        ),
    ]  # fmt: skip


def ready() -> list[Figure]:
    config = settings(1 << 20, 1, host_bytes=8 << 30)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with serving(config):
            seconds.append(time.perf_counter() - start)
    return [
        Figure(
            "node.ready_8GiB", median(seconds), "s", None, None, 2.0, median(seconds) <= 2.0,
            spread(seconds), "lmc serve from its start to the ready line; its memory is filled "
            "in the background",
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    figures = [*lookup(args.rounds), *copies(args.rounds), *concurrent(), *ready()]
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
