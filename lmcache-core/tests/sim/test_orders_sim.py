"""Seeded lives under controllers' orders: clears, copies, pins, recodings and quotas, among stores,
faults and crashes.

What must hold beside what holds in every life: a clear that ended without a failure leaves nothing
that was there when it began; what a copy says is held is there; what is pinned stays.
"""

from __future__ import annotations

import itertools
import os
import time

import pytest
from test_simulation import CHUNK, LAYOUT, SLOT_BYTES, CheckedPages, Simulation, Write, write_of
from world import Crash, SimRemote

from lmcache_core.agent import wire
from lmcache_core.agent.orders import Orders
from lmcache_core.engine import CacheEngine
from lmcache_core.layout import LayoutSpec
from lmcache_core.pins import Pins
from lmcache_core.sdk import Capabilities, ConfigError, Sharing
from lmcache_core.tiers.remote import RemoteTier

SEEDS = range(int(os.environ.get("LMC_SIM_SEEDS", "50")))
KINDS = (wire.ChunkKind(bytes(6), LayoutSpec.of(LAYOUT)),)
PLACES = ("host", "disk", "remote")


class Listed(SimRemote):
    """The shared store, which can say what it has."""

    capabilities = Capabilities(max_concurrency=8, evicts=True, sharing=Sharing.CLUSTER, scan=True)


class Ordered:
    """A part of the engine: carries out orders, and looks whether what they say is so."""

    busy = False

    def __init__(self, life: OrderedLife, engine: CacheEngine) -> None:
        self.life = life
        self.engine = engine
        self.pins = Pins(engine, max_bytes=3 * SLOT_BYTES)
        self.orders = Orders(engine, self.pins, no_peer)
        self.clears: dict[str, set[bytes]] = {}
        self.copies: dict[str, str] = {}
        self.seen: set[str] = set()

    def tick(self) -> None:
        self.pins.tick()
        self.orders.step()
        for progress in self.orders.progress():
            if progress.state == "running" or progress.id in self.seen:
                continue
            self.seen.add(progress.id)
            self.orders.recorded((progress.id,))
            self.life.held[progress.id] = progress.held
            self.life.ended[progress.state] = self.life.ended.get(progress.state, 0) + 1
            if progress.id in self.clears:
                self._cleared(progress)
            elif progress.id in self.copies and progress.state == "done":
                self._copied(progress)

    def close(self) -> bool:
        return self.pins.close()

    def stored(self, keys: list[bytes]) -> None:
        """Stored again: a clear that runs may leave them."""
        for since in self.clears.values():
            since.update(keys)

    def _cleared(self, progress: wire.Progress) -> None:
        again = self.clears.pop(progress.id)
        if progress.errors or progress.state != "done":
            return
        self.life.exact += 1
        host = self.engine.host
        left = {key for key in host.resident() if key not in again}
        assert not left, "a cleared chunk is served from host"
        for tier in self.engine.tiers.readable:
            left = {key for key in tier.resident() if key not in again}
            assert not left, f"a cleared chunk is in {tier.name}"
        assert not set(self.life.remote._values) - again, "a cleared chunk is on the shared store"

    def _copied(self, progress: wire.Progress) -> None:
        del self.copies[progress.id]
        self.life.copied += len(progress.held) // 46


class OrderedLife(Simulation):
    """`Simulation` with orders."""

    def __init__(self, seed: int, write: Write = "through") -> None:
        self.numbers = itertools.count(1)
        self.ended: dict[str, int] = {}
        self.held: dict[str, bytes] = {}
        self.exact = self.copied = 0
        super().__init__(seed, write=write)

    def shared_store(self) -> SimRemote:
        return Listed(self.rng, lambda: self.runtime.time_s)

    def start(self) -> CacheEngine:
        engine = super().start()
        ordered = self.ordered = Ordered(self, engine)
        engine.parts.append(ordered)
        inner = engine.store

        def store(tokens, pages):  # type: ignore[no-untyped-def]
            ordered.stored(engine.keys(tokens))
            return inner(tokens, pages)

        engine.store = store  # type: ignore[method-assign]
        return engine

    def step(self) -> None:
        if self.rng.random() < 0.12:
            self.order()
        super().step()
        self.check_pins()

    def order(self) -> None:
        ident = f"o{next(self.numbers)}"
        orders, kind = self.ordered.orders, self.rng.random()
        keys = self.engine.keys(self.prompt())
        joined = b"".join(keys)
        if kind < 0.3:
            if self.rng.random() < 0.5:
                self.ordered.clears[ident] = set()
                orders.accept(wire.Clear(id=ident, tags=(self.engine.namespace.tag,)))
            else:
                tiers = (self.rng.choice(PLACES),)
                orders.accept(wire.Clear(id=ident, keys=joined, tiers=tiers))
        elif kind < 0.6:
            source, target = self.rng.sample(PLACES, 2)
            self.ordered.copies[ident] = target
            pin = self.rng.choice(["", "", "held"])
            orders.accept(
                wire.Copy(id=ident, source=source, target=target, keys=joined, kinds=KINDS, pin=pin)
            )
        elif kind < 0.75:
            orders.accept(
                wire.Pin(
                    id=ident,
                    pin=f"p{self.rng.randrange(3)}",
                    tier=self.rng.choice(PLACES),
                    keys=joined,
                    until_s=time.time() + self.rng.choice([0.3, 1e6]),
                    kinds=KINDS,
                )
            )
        elif kind < 0.85:
            name = self.rng.choice(["p0", "p1", "p2", "held"])
            orders.accept(wire.Unpin(id=ident, pin=name))
        elif kind < 0.92:
            tier, codec = self.rng.choice(["disk", "remote"]), self.rng.choice(["toy", ""])
            tags = (self.engine.namespace.tag,)
            orders.accept(wire.Recode(id=ident, tier=tier, codec=codec, tags=tags, kinds=KINDS))
        elif kind < 0.96:
            self.cancel(ident)
        else:
            limit = self.rng.choice([{}, {self.engine.namespace.tag: 3 * SLOT_BYTES}])
            self.engine.host.limit_shares(limit)
            self.engine.tiers.readable[0].limit_shares(limit)

    def cancel(self, ident: str) -> None:
        """A copy that has just begun."""
        keys = b"".join(self.engine.keys(self.prompt()))
        self.ordered.orders.accept(
            wire.Copy(id=ident, source="disk", target="remote", keys=keys, kinds=KINDS)
        )
        self.engine.poll()
        self.ordered.orders.cancel(ident)

    def check_pins(self) -> None:
        """What is pinned in host is there, unless it was cleared or dropped a moment ago."""
        for one in self.ordered.pins._pins.values():
            for key, chunk in one.chunks.items():
                assert chunk.pins > 0
                assert chunk.doomed or self.engine.host.get(key) is chunk

    def settle(self) -> None:
        super().settle()
        run_until(self, lambda: not self.ordered.orders.active)
        for name in ("p0", "p1", "p2", "held"):
            self.ordered.pins.unpin(name)
        self.engine.host.limit_shares({})
        super().settle()


class CalmLife(OrderedLife):
    """Nothing fails, so that every clear is exact; calls still stall and overtake each other."""

    def step(self) -> None:
        super().step()
        self.remote.trouble = 0.0
        self.disk.fault = lambda op: None

    def damage_a_file(self) -> None:
        """None is."""


def no_peer(address: str) -> RemoteTier:
    raise ConfigError("no channel here")


@pytest.mark.parametrize("life", [OrderedLife, CalmLife])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_life_under_orders_is_exact(seed: int, life: type[OrderedLife]) -> None:
    life(seed, write_of(seed)).run(steps=250)


def test_the_lives_exercise_what_they_are_for() -> None:
    lives = [kind(seed) for kind in (OrderedLife, CalmLife) for seed in range(8)]
    for life in lives:
        life.run(steps=250)
    assert sum(life.restarts for life in lives) >= 8
    assert sum(life.exact for life in lives) > 20
    assert sum(life.copied for life in lives) > 100
    for state, least in (("done", 200), ("failed", 50), ("cancelled", 3)):
        assert sum(life.ended.get(state, 0) for life in lives) >= least, state


def test_a_crash_at_every_file_operation_of_a_move_loses_nothing() -> None:
    """Copied, then cleared at the source: at every moment one of them has it."""
    tokens = [t for t in (0, 1, 2) for _ in range(CHUNK)]
    for number in range(200):
        life = OrderedLife(seed=number)
        life.durability = "host"
        life.engine = life.start()
        life.engine.store(tokens, CheckedPages(tokens))
        assert life.engine.flush(5.0)
        keys = life.engine.keys(tokens)
        life.engine.host.drop(keys)
        life.engine.tiers.readable[1].delete(keys)
        run_until(life, lambda life=life: not life.remote._values)
        life.disk.crash_after(number)
        try:
            move(life, keys)
            ended = True
        except Crash:
            ended = False
        life.disk.fault = lambda op: None
        life.disk.crash(power=bool(number % 2))
        life.restarts += 1
        life.engine = life.start()
        found = life.engine.retrieve(tokens, CheckedPages(tokens))
        assert found == len(tokens), f"lost at file operation {number}"
        if ended:
            assert number > 3, "too few operations to mean something"
            return
    raise AssertionError("it never came to its end")


def move(life: OrderedLife, keys: list[bytes]) -> None:
    orders = life.ordered.orders
    joined = b"".join(keys)
    orders.accept(wire.Copy(id="c", source="disk", target="remote", keys=joined, kinds=KINDS))
    run_until(life, lambda: "c" in life.held)
    assert sorted(wire.split(life.held["c"])) == sorted(keys)
    orders.accept(wire.Clear(id="x", tiers=("disk",), keys=life.held["c"]))
    run_until(life, lambda: not orders.active)


def run_until(life: OrderedLife, ready) -> None:  # type: ignore[no-untyped-def]
    for _ in range(5000):
        life.runtime.wait(0.01)
        life.engine.poll()
        if ready():
            return
    raise AssertionError("it never ends")
