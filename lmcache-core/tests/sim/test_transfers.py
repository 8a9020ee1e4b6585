"""Seeded lives of a prefiller and two decoders over a channel that can't stop what runs.

What must hold in every run: a chunk that is served has its own bytes; nobody writes into a slot
that is served or given to another chunk; every transfer ends; no slot, pin or grant leaks.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from net import SimChannels, SimNet
from world import SimRuntime

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.envelope import stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import Buffer
from lmcache_core.tiers.host import ChunkState
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.push import Push
from lmcache_core.transport.receive import Expected, Missing
from lmcache_core.transport.transport import Transport

SEEDS = range(int(os.environ.get("LMC_SIM_SEEDS", "50")))
PAYLOAD_BYTES = 9_000
SLOTS = 9
LAYOUT = ChunkLayout(chunk_size=4, payload_bytes=PAYLOAD_BYTES, description=b"sim transfers")
CONFIG = EngineConfig(
    host_bytes=SLOTS * stored_bytes(PAYLOAD_BYTES), close_timeout_s=0.5, max_transfers=16,
    transfer_start_s=4.0,
)  # fmt: skip


def key(number: int) -> bytes:
    return number.to_bytes(46, "little")


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, PAYLOAD_BYTES, np.uint8)


class Runtime(SimRuntime):
    """Its clock is the world's."""

    def __init__(self, rng: random.Random, clock: list[float]) -> None:
        self._clock = clock
        super().__init__(rng)

    @property
    def time_s(self) -> float:
        return self._clock[0]

    @time_s.setter
    def time_s(self, value: float) -> None:
        self._clock[0] = max(self._clock[0], value)


class Node:
    def __init__(self, name: str, rng: random.Random, net: SimNet, clock: list[float]) -> None:
        self.runtime = Runtime(rng, clock)
        metrics = Metrics()
        arena = Arena.create(
            CONFIG.host_bytes, huge_pages=False, prefault=False, warn=lambda text: None
        )
        self.engine = ChunkEngine(config=CONFIG, arena=arena, runtime=self.runtime, metrics=metrics)
        hub = Hub(
            "sim://",
            secret=b"s" * 32,
            region=arena.region,
            metrics=metrics,
            released=self.engine.released,
            clock=self.runtime.now_s,
            channels=SimChannels(net, name, self.touched),  # type: ignore[arg-type]
        )
        self.transport = Transport(self.engine, hub, CONFIG, identity={"one": "kind"})
        self.engine.parts.append(self.transport)

    def touched(self, target: Buffer) -> None:
        """A peer writes: only into what waits for it, or is kept from all others."""
        offset = target.address - self.engine.host.arena.region.address
        lost = self.engine._lost.get(offset)
        if lost is not None:
            return
        for chunk in self.engine.host._chunks.values():
            if chunk.offset == offset:
                assert chunk.state is ChunkState.WRITING, "a slot that is served"
                return
        # Its chunk was dropped while it was written: the slot is still nobody else's.
        assert offset in self.engine.host._allocator._live, "a slot that is free"

    def check(self) -> None:
        host = self.engine.host
        held = host.keys()
        for found in held:
            chunk = host.get(found)
            if chunk is not None:
                number = int.from_bytes(found, "little")
                assert (host.payload(chunk) == content(number)).all(), "wrong bytes"

    def store(self, number: int) -> None:
        chunk = self.engine.reserve_key(key(number), None, layout=LAYOUT)
        if chunk is not None:
            self.engine.host.payload(chunk)[:] = content(number)
            self.engine.commit([chunk])


class Life:
    """One prefiller, two decoders, and requests that come and go."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        clock = [1000.0]
        self.net = SimNet(self.rng, lambda: clock[0])
        names = ("prefiller", "first", "second")
        self.nodes = [Node(name, self.rng, self.net, clock) for name in names]
        self.clock = clock
        self.pushes: list[tuple[Push, list[int]]] = []
        self.expected: list[tuple[Node, Expected]] = []
        self.count = 0
        self.received = 0

    def begin(self) -> None:
        decoder = self.rng.choice(self.nodes[1:])
        numbers = self.rng.sample(range(12), self.rng.randint(1, 4))
        self.count += 1
        name = f"t{self.count}"
        deadline_s = self.clock[0] + self.rng.uniform(0.2, 12.0)
        order = [0, 1]
        self.rng.shuffle(order)
        for which in order:
            if which:
                push = self.nodes[0].transport.pusher.start(
                    name, decoder.transport.address, deadline_s=deadline_s
                )
                if push is not None:
                    self.pushes.append((push, numbers))
            else:
                expected = decoder.transport.receiver.expect(
                    name, [Missing(key(n), None, LAYOUT) for n in numbers], deadline_s=deadline_s
                )
                assert expected is not None
                self.expected.append((decoder, expected))

    def compute(self) -> None:
        if self.pushes:
            push, numbers = self.rng.choice(self.pushes)
            for number in self.rng.sample(numbers, self.rng.randint(1, len(numbers))):
                self.nodes[0].store(number)
            if self.rng.random() < 0.2:
                self.nodes[0].transport.pusher.computed(push)
                self.pushes.remove((push, numbers))

    def look(self) -> None:
        for one in list(self.expected):
            node, expected = one
            if expected.done or self.rng.random() < 0.02:
                self.received += expected.received_bytes > 0
                node.transport.receiver.release(expected)
                self.expected.remove(one)

    def step(self) -> None:
        self.clock[0] += self.rng.choice((0.0, 0.0001, 0.01, 0.1))
        move = self.rng.random()
        if move < 0.08:
            self.begin()
        elif move < 0.25:
            self.compute()
        elif move < 0.30:
            node = self.rng.choice(self.nodes)
            node.engine.drop([key(self.rng.randrange(12))])
        elif move < 0.30 + self.net.trouble / 20:
            one, other = self.rng.sample([n.transport.hub.channel for n in self.nodes], 2)
            self.net.break_link(one, other)  # type: ignore[arg-type]
        elif move < 0.60:
            self.net.step()
        elif move < 0.85:
            self.rng.choice(self.nodes).runtime.run_one()
        self.rng.choice(self.nodes).engine.poll()
        self.look()
        for node in self.nodes:
            node.check()

    def settle(self) -> None:
        """Nothing new: what is on its way ends."""
        for push, _ in self.pushes:
            self.nodes[0].transport.pusher.computed(push)
        for _ in range(3000):
            self.clock[0] += 0.01
            self.net.step()
            for node in self.nodes:
                node.runtime.run_one()
                node.engine.poll()
            self.look()
        self.net.drain()
        for node in self.nodes:
            while node.runtime.run_one():
                pass
            node.engine.poll()
            node.engine.poll()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_life_ends_well(seed: int) -> None:
    life = Life(seed)
    life.net.trouble = (0.0, 0.3, 1.0)[seed % 3]
    for _ in range(400):
        life.step()
    life.settle()
    assert not life.expected
    for node in life.nodes:
        node.check()
        assert not node.transport.busy
        node.engine.host.drop(node.engine.host.keys())
        assert node.engine.host.used_bytes == 0, "a slot or a pin is left"
        assert not node.engine._lost


def test_a_world_without_trouble_moves_chunks() -> None:
    received = 0
    for seed in range(5):
        life = Life(seed)
        for _ in range(400):
            life.step()
        life.settle()
        received += life.received
    assert received >= 10
