"""The controller's directory: 1,000,000 chunks over 100 instances.

python benchmarks/controller.py [--out build/bench.json] [--instances 100] [--chunks 10000]

In process: a prefix of 32,768 tokens (128 chunks) that 1, 10 or all instances have.  Over HTTP: the
same with the token ids in the request, from another process, on one kept connection.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing as mp
import random
import resource
import secrets
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from figures import Figure, median, save, show, spread

from lmcache_core.agent import wire
from lmcache_core.cli.listening import listen
from lmcache_core.controller.app import build
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.core import Controller
from lmcache_core.controller.directory import Directory
from lmcache_core.controller.state_sqlite import SqliteState
from lmcache_core.keys import ChunkHasher, Namespace, key_suffix
from lmcache_core.layout import LayoutSpec

PROMPT_TOKENS = 32_768
CHUNK = 256
ROUNDS = 500
TOKEN = "benchmark-token-0123456789"
IN_PROCESS_S, HTTP_S, CLEAR_S = 0.001, 0.005, 0.050
METHOD = "1,000,000 chunks over 100 instances"


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)]


def timed(run: Callable[[], object], rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def figure(name: str, seconds: list[float], target_s: float) -> list[Figure]:
    found = []
    for part, value in (("p50", median(seconds)), ("p99", p99(seconds))):
        goal = target_s if part == "p50" else None
        found.append(
            Figure(
                name=f"controller {name} {part}", value=value * 1e3, unit="ms", limit=None,
                ratio=None, target=None if goal is None else goal * 1e3,
                met=None if goal is None else value <= goal, spread=spread(seconds), method=METHOD,
            )
        )  # fmt: skip
    return found


async def fill(directory: Directory, slots: list[int], chunks: int) -> None:
    for slot in slots:
        tier = random.randrange(2)
        keys = [secrets.token_bytes(46) for _ in range(chunks)]
        await directory.add(slot, tier, keys)


def in_process(instances: int, chunks: int) -> list[Figure]:
    before = rss_bytes()
    directory = Directory(max_chunks=10_000_000, max_chunks_per_instance=1_000_000)
    slots = [directory.join() for _ in range(instances)]
    asyncio.run(fill(directory, slots, chunks))
    taken = rss_bytes() - before
    figures = []
    for holders in (1, 10, instances):
        keys = [secrets.token_bytes(46) for _ in range(PROMPT_TOKENS // CHUNK)]
        for number, slot in enumerate(slots[:holders]):
            asyncio.run(directory.add(slot, 0, keys[: len(keys) - number % 64]))
            asyncio.run(directory.add(slot, 1, keys[: len(keys) - number % 32]))
        seconds = timed(lambda: directory.prefix(keys), ROUNDS)
        assert len(directory.prefix(keys)) == holders
        figures += figure(f"lookup of 128 chunks, {holders} holders", seconds, IN_PROCESS_S)
    figures += asyncio.run(clears(directory, slots))
    each = taken / (instances * chunks)
    print(f"memory of the directory: {taken / (1 << 20):.0f} MiB, {each:.0f} bytes a chunk")
    figures.append(
        Figure(name="controller directory memory", value=each, unit="bytes a chunk", limit=None,
               ratio=None, target=None, met=None, spread=0.0, method=METHOD)
    )  # fmt: skip
    return figures


async def clears(directory: Directory, slots: list[int]) -> list[Figure]:
    """Forgetting an instance, and how long others wait meanwhile."""
    seconds: list[float] = []
    stalls: list[float] = []

    async def others() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0)
            stalls.append(time.perf_counter() - start)

    watch = asyncio.create_task(others())
    for slot in slots[:20]:
        start = time.perf_counter()
        await directory.clear(slot)
        seconds.append(time.perf_counter() - start)
    watch.cancel()
    print(f"longest turn that forgetting took: {max(stalls) * 1e3:.1f} ms")
    return figure("forgetting of an instance", seconds, CLEAR_S)


def model() -> wire.Model:
    namespace = Namespace.of({"weights": "benchmark"})
    kinds = (wire.ChunkKind(key_suffix(0, 0), LayoutSpec(CHUNK, 1 << 20, b"bytes")),)
    return wire.Model("m", namespace.tag, namespace.pairs, CHUNK, "sha256", kinds)


def serve(pipe: Connection, instances: int, chunks: int) -> None:
    """A controller that has it all, in a process of its own."""
    config = ControllerConfig(token=TOKEN)
    tokens: list[int] = pipe.recv()

    async def main() -> None:
        known = Controller(config, SqliteState(":memory:"))
        served = model()
        digests = ChunkHasher(Namespace.from_pairs(served.pairs), chunk_size=CHUNK).digests(tokens)
        keys = [served.tag + digest + served.kinds[0].suffix for digest in digests]
        tiers = tuple(wire.TierStatus(name, "", 0, 0, True) for name in ("host", "disk"))
        status = wire.Status(version="1", pid=1, uptime_s=1.0, tiers=tiers)
        for number in range(instances):
            changes = (wire.Change(0, True, wire.join(keys)),) if number < 10 else ()
            await known.sync(
                wire.Sync(
                    version=wire.VERSION, instance=f"i{number}", incarnation="p", seq=1,
                    kind="embedded", reset=True, status=status, models=(served,), changes=changes,
                )
            )  # fmt: skip
        await fill(known.directory, [r.slot for r in known.registry.records.values()], chunks)
        listener = listen("127.0.0.1", 0)
        app = build(config, known, on_start=lambda: pipe.send(listener.getsockname()[1]))
        await uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on")).serve([listener])

    asyncio.run(main())


def over_http(instances: int, chunks: int) -> list[Figure]:
    ours, theirs = mp.Pipe()
    process = mp.get_context("spawn").Process(
        target=serve, args=(theirs, instances, chunks), daemon=True
    )
    process.start()
    tokens = [random.randrange(128_000) for _ in range(PROMPT_TOKENS)]
    ours.send(tokens)
    connection = http.client.HTTPConnection("127.0.0.1", ours.recv())
    body = json.dumps({"select": {"tokens": tokens}})
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    def ask() -> None:
        connection.request("POST", "/v1/lookup", body, headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200 and len(found["instances"]) == 10

    for _ in range(20):
        ask()
    seconds = timed(ask, ROUNDS)
    process.terminate()
    process.join()
    return figure("lookup of 32k tokens over HTTP", seconds, HTTP_S)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("build/controller-bench.json"))
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--chunks", type=int, default=10_000, help="of each instance")
    given = parser.parse_args()
    figures = in_process(given.instances, given.chunks)
    figures += over_http(given.instances, given.chunks)
    save(figures, given.out)
    show(given.out)


if __name__ == "__main__":
    main()
