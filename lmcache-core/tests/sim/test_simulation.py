"""Seeded single-thread runs of engine, tiers and file connector over a crashing disk.

What must hold in every run: bytes that come back are the bytes stored under that
identity; the disk tier never holds more than its size; no pin and no slot leaks.
"""

from __future__ import annotations

import errno
import os
import random
from typing import Literal

import msgspec
import numpy as np
import pytest
from toy_codecs import Toy, holding
from world import Crash, SimDisk, SimRemote, SimRuntime

from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.connectors.file import FileConnector
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.prefetch import Prefetch
from lmcache_core.recode import Recode
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.host import ChunkState
from lmcache_core.tiers.remote import RemoteTier

# The last ones found something once.
SEEDS = [*range(int(os.environ.get("LMC_SIM_SEEDS", "50"))), 750]
PAYLOAD_BYTES = 13_000
SLOT_BYTES = stored_bytes(PAYLOAD_BYTES)
HOST_CHUNKS, DISK_CHUNKS, CHUNK = 7, 12, 4
LAYOUT = ChunkLayout(chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"sim")
TIER = TierConfig(
    url="file:///kv", size_bytes=DISK_CHUNKS * SLOT_BYTES, max_queued=6, deadline_s=1.0
)
REMOTE = TierConfig(url="memory://", max_queued=6, deadline_s=1.0, negative_ttl_s=0.3)
CONFIG = EngineConfig(
    host_bytes=HOST_CHUNKS * SLOT_BYTES,
    tiers=(TIER,),
    chunk_size=CHUNK,
    close_timeout_s=1.0,
    write_ahead_bytes=4 * SLOT_BYTES,
)


def content(tokens: list[int]) -> np.ndarray:
    """The only right bytes of the last chunk of ``tokens``."""
    seed = hash(tuple(tokens)) & 0xFFFFFFFF
    # Every other chunk is too random to shrink.
    kinds = 256 if seed % 2 else 4
    return np.random.default_rng(seed).integers(0, kinds, PAYLOAD_BYTES, np.uint8)


class CheckedPages:
    """Writes the right bytes, and compares every byte that comes back."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def offload(self, index: int, slot: np.ndarray) -> None:
        slot[:] = content(self.tokens[: (index + 1) * CHUNK])

    def onboard(self, index: int, slot: np.ndarray) -> None:
        assert np.array_equal(slot, content(self.tokens[: (index + 1) * CHUNK])), "wrong bytes"


Write = Literal["through", "on_evict"]
"""When the disk is written."""


def write_of(seed: int) -> Write:
    """Every third life spares the disk."""
    return "through" if seed % 3 else "on_evict"


class Simulation:
    def __init__(self, seed: int, durability: str = "", write: Write = "through") -> None:
        self.rng = random.Random(seed)
        self.disk = SimDisk(self.rng)
        drawn = self.rng.choice(["process", "host"])
        self.durability = durability or drawn
        self.remote = self.shared_store()
        self.tickets: list[Prefetch] = []
        self.prompts: dict[int, list[int]] = {}
        self.seed = seed
        self.restarts = self.hits = self.recoded = 0
        self.stored = {"disk": 0, "remote": 0}
        self.recodes: list[Recode] = []
        self.write = write
        self.toy = Toy()
        self.codecs = holding(self.toy)
        self.codecs.ready("toy", 10.0)
        self.engine = self.start()

    def shared_store(self) -> SimRemote:
        return SimRemote(self.rng, lambda: self.runtime.time_s)

    def start(self) -> CacheEngine:
        self.runtime = SimRuntime(self.rng)
        metrics = Metrics()
        # Every second life encodes; each reads what the other wrote.
        codec = "toy" if (self.seed + self.restarts) % 2 else ""
        connector = FileConnector(
            "/kv",
            durability=self.durability,
            ops=self.disk,
            clock=self.runtime.now_s,
            pid=self.restarts + 1,
            is_alive=lambda pid: pid == self.restarts + 1,
        )
        engine = CacheEngine(
            config=CONFIG,
            layout=LAYOUT,
            namespace=Namespace.of({"model": "sim"}),
            arena=Arena.create(CONFIG.host_bytes, prefault=False, warn=lambda text: None),
            open_tiers=lambda host: [
                RemoteTier(
                    name,
                    store,
                    config=config,
                    host=host,
                    runtime=self.runtime,
                    metrics=metrics,
                    encoding=Encoding(config, self.codecs),
                )
                for name, store, config in (
                    (
                        "disk",
                        connector,
                        msgspec.structs.replace(TIER, codec=codec, write=self.write),
                    ),
                    ("remote", self.remote, msgspec.structs.replace(REMOTE, codec=codec)),
                )
            ],
            runtime=self.runtime,
            metrics=metrics,
        )
        engine.tiers.readable[0].recover()
        return engine

    def prompt(self) -> list[int]:
        """Out of a small tree of shared prefixes."""
        length = self.rng.randint(1, 4)
        return [t for _ in range(length) for t in [self.rng.randrange(3)] * CHUNK]

    def step(self) -> None:
        self.runtime.time_s += self.rng.choice([0.0, 0.01, 0.2])
        for executor in self.runtime.executors:
            executor.stalled = executor.stalled and self.rng.random() < 0.5
        action = self.rng.random()
        if action < 0.35:
            tokens = self.prompt()
            self.engine.store(tokens, CheckedPages(tokens))
        elif action < 0.65:
            tokens = self.prompt()
            self.hits += self.engine.retrieve(tokens, CheckedPages(tokens))
        elif action < 0.72:
            self.prefetch()
        elif action < 0.75:
            self.recode()
        elif action < 0.90:
            for _ in range(self.rng.randint(1, 15)):
                self.runtime.wait(0.01)
            self.engine.poll()
        elif action < 0.91:
            self.rng.choice(self.runtime.executors).stalled = True
            self.remote.trouble = self.rng.choice([0.0, 0.0, 0.1, 0.9])
            self.runtime.time_s += self.rng.choice([0.0, 0.1, 0.1, 2.0])
        elif action < 0.93:
            self.break_disk_for_a_while()
        elif action < 0.94:
            self.engine.clear()
        elif action < 0.985:
            self.damage_a_file()
        else:
            self.crash_soon()
        assert self.disk.peak_bytes <= TIER.size_bytes, "the disk tier was over its size"

    def prefetch(self) -> None:
        """Tickets overlap, are checked when they are done, and some are given up early."""
        tokens = self.prompt()
        keys = self.engine.keys(tokens)
        if len(self.tickets) < 3:
            ticket = self.engine.prefetch(keys, deadline_s=self.runtime.time_s + 0.5)
            self.tickets.append(ticket)
            self.prompts[id(ticket)] = tokens
        for _ in range(self.rng.randint(0, 4)):
            self.runtime.wait(0.01)
            self.engine.poll()
        for ticket in list(self.tickets):
            if ticket.done or self.rng.random() < 0.3:
                for index, chunk in enumerate(ticket.hits()):
                    pages = CheckedPages(self.prompts[id(ticket)])
                    pages.onboard(index, self.engine.host.payload(chunk))
                self.engine.release(ticket)
                self.tickets.remove(ticket)

    def recode(self) -> None:
        """Another form for a prefix or for all, of either tier, while everything goes on."""
        tier = self.rng.choice(["disk", "remote"])
        tokens = self.rng.choice([self.prompt(), None])
        codec = self.rng.choice(["toy", ""])
        self.recodes.append(self.engine.compress(tokens, tier=tier, codec=codec))
        if self.rng.random() < 0.2:
            self.rng.choice(self.recodes).cancel()

    def break_disk_for_a_while(self) -> None:
        number = self.rng.choice([errno.EIO, errno.ENOSPC, errno.EMFILE])
        left = self.rng.randint(1, 4)

        def fault(op: str) -> None:
            nonlocal left
            if left and self.rng.random() < 0.5:
                left -= 1
                raise OSError(number, os.strerror(number))

        self.disk.fault = fault

    def damage_a_file(self) -> None:
        if self.disk.names:
            inode = self.disk.names[self.rng.choice(sorted(self.disk.names))]
            if inode.data:
                inode.data[self.rng.randrange(len(inode.data))] ^= 1 << self.rng.randrange(8)

    def crash_soon(self) -> None:
        self.disk.crash_after(self.rng.randint(0, 12))

    def restart(self) -> None:
        self.disk.crash(power=self.rng.random() < 0.5)
        self.disk.peak_bytes = 0
        self.tickets.clear()
        self.recoded += sum(order.recoded for order in self.recodes)
        self.recodes.clear()
        self.count_stored()
        self.restarts += 1
        self.engine = self.start()

    def settle(self) -> None:
        self.disk.fault = lambda op: None
        self.remote.trouble = 0.0
        for ticket in self.tickets:
            self.engine.release(ticket)
        self.tickets.clear()
        for executor in self.runtime.executors:
            executor.stalled = False
        # The next write removes what a failed one could not.
        self.engine.tiers.delete([b"nothing"])
        for _ in range(500):
            self.runtime.wait(0.05)
            self.engine.poll()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            try:
                self.step()
            except Crash:
                self.restart()
        try:
            self.settle()
        except Crash:
            self.restart()
            self.settle()
        self.check_nothing_leaked()

    def check_nothing_leaked(self) -> None:
        host, tier = self.engine.host, self.engine.tiers.readable[0]
        chunks = [host.get(key) for key in list(host.keys())]
        assert all(c is not None and c.state is ChunkState.SEALED for c in chunks)
        assert all(c is not None and c.pins == 0 for c in chunks)
        assert host.used_bytes == len(chunks) * SLOT_BYTES
        for other in self.engine.tiers.readable:
            assert other.available, other.unavailable_reason
            assert not other.settling
        assert tier.used_bytes >= self.disk.used_bytes(), "bytes on disk that nobody counts"
        assert tier.used_bytes <= TIER.size_bytes
        assert all(order.done for order in self.recodes)
        self.recoded += sum(order.recoded for order in self.recodes)
        self.count_stored()
        assert self.engine.close()

    def count_stored(self) -> None:
        counters = self.engine.metrics.snapshot()
        for tier in self.stored:
            self.stored[tier] += counters.get(f"{tier}.stored", 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_life_with_crashes_is_never_wrong(seed: int) -> None:
    simulation = Simulation(seed, write=write_of(seed))
    simulation.run(steps=250)


def test_the_simulation_exercises_what_it_is_for() -> None:
    runs = [Simulation(seed) for seed in range(8)]
    for simulation in runs:
        simulation.run(steps=250)
    assert sum(s.restarts for s in runs) >= 8
    assert sum(s.hits for s in runs) > 1000
    assert sum(s.recoded for s in runs) > 10
    assert sum(s.toy.decoded for s in runs) > 30
    assert sum(s.stored["disk"] for s in runs) > 200
    assert sum(s.stored["remote"] for s in runs) > 200
    sparing = [Simulation(seed, write="on_evict") for seed in range(4)]
    for simulation in sparing:
        simulation.run(steps=250)
    assert sum(s.stored["disk"] for s in sparing) > 50
    assert sum(s.hits for s in sparing) > 300
