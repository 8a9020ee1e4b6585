"""Pins: what is pinned stays under any pressure, for as long as it was asked, and no longer."""

from __future__ import annotations

import msgspec
import pytest
from scripted import LAYOUT, SLOT_BYTES, TIER, Make, Pages, Scripted, make, prompt, stored, until

from lmcache_core.clearing import Clearing
from lmcache_core.engine import CacheEngine
from lmcache_core.pins import MAX_PINS, Pins, Run
from lmcache_core.sdk import ConfigError

__all__ = ["make"]
FOREVER = 1e9
HOST_CHUNKS = 8


def pins_of(engine: CacheEngine, *, chunks: int = 100) -> Pins:
    pins = Pins(engine, max_bytes=chunks * SLOT_BYTES)
    engine.parts.append(pins)
    return pins


def runs(engine: CacheEngine, seed: int, chunks: int) -> list[Run]:
    return [Run(engine.keys(prompt(seed, chunks)), LAYOUT)]


def press(engine: CacheEngine, prompts: int = 10) -> None:
    """Fill the host tier several times over."""
    for seed in range(50, 50 + prompts):
        engine.store(prompt(seed, 4), Pages(seed))
        assert engine.flush(5)


def test_a_pinned_prefix_survives_what_evicts_everything_else(make: Make) -> None:
    engine = make(Scripted())
    pins = pins_of(engine)
    engine.store(prompt(1, 3), Pages(1))
    engine.store(prompt(2, 3), Pages(2))
    one = pins.pin("a", runs(engine, 1, 3), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    press(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 3))) == 3
    assert engine.host.prefix(engine.keys(prompt(2, 3))) == 0
    assert pins.unpin("a")
    press(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 3))) == 0


def test_what_is_below_is_brought_to_host(make: Make) -> None:
    engine = make(Scripted())
    stored(engine, 1, 3)
    one = pins_of(engine).pin("a", runs(engine, 1, 3), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    assert list(one.held) == engine.keys(prompt(1, 3)) and not one.missing
    assert one.nbytes == 3 * SLOT_BYTES


def test_what_nobody_has_is_told(make: Make) -> None:
    engine = make(Scripted())
    stored(engine, 1, 2)
    one = pins_of(engine).pin("a", runs(engine, 1, 5), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    assert len(one.held) == 2 and sum(one.missing.values()) == 3


def test_a_pin_ends_at_its_time(make: Make) -> None:
    engine = make()
    pins = pins_of(engine)
    engine.store(prompt(1, 2), Pages(1))
    one = pins.pin("a", runs(engine, 1, 2), tier="host", until_s=engine.now_s() + 0.15)
    until(engine, lambda: one.done)
    assert pins.host_bytes == 2 * SLOT_BYTES
    until(engine, lambda: "a" not in pins)
    assert pins.host_bytes == 0
    assert engine.metrics.snapshot()["pins.expired"] == 1


def test_two_pins_of_one_chunk_end_one_by_one(make: Make) -> None:
    engine = make()
    pins = pins_of(engine)
    engine.store(prompt(1, 2), Pages(1))
    for name in ("a", "b"):
        one = pins.pin(name, runs(engine, 1, 2), tier="host", until_s=FOREVER)
        until(engine, lambda one=one: one.done)  # type: ignore[misc]
    assert pins.host_bytes == 2 * SLOT_BYTES, "each chunk counts once"
    pins.unpin("a")
    press(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 2))) == 2
    pins.unpin("b")
    assert pins.host_bytes == 0
    press(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 2))) == 0


def test_the_bound_on_pinned_memory_holds(make: Make) -> None:
    engine = make()
    pins = pins_of(engine, chunks=2)
    engine.store(prompt(1, 4), Pages(1))
    one = pins.pin("a", runs(engine, 1, 4), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    assert len(one.held) == 2 and one.missing == {"no_room": 2}
    assert pins.host_bytes == 2 * SLOT_BYTES


def test_a_second_pin_of_a_name_replaces_the_first(make: Make) -> None:
    engine = make()
    pins = pins_of(engine)
    engine.store(prompt(1, 2), Pages(1))
    engine.store(prompt(2, 2), Pages(2))
    for seed in (1, 2):
        one = pins.pin("a", runs(engine, seed, 2), tier="host", until_s=FOREVER)
        until(engine, lambda one=one: one.done)  # type: ignore[misc]
    press(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 2))) == 0
    assert engine.host.prefix(engine.keys(prompt(2, 2))) == 2


def test_what_is_cleared_is_let_go_of(make: Make) -> None:
    engine = make(Scripted())
    pins = pins_of(engine)
    engine.store(prompt(1, 3), Pages(1))
    one = pins.pin("a", runs(engine, 1, 3), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    clearing = Clearing(engine, tiers=["host"])
    until(engine, lambda: (clearing.step(), clearing.done)[1])
    until(engine, lambda: pins.host_bytes == 0)
    assert not one.held and engine.host.used_bytes == 0, "its memory is free again"


def test_a_pin_below_host_survives_the_quota(make: Make) -> None:
    store = Scripted()
    tier = msgspec.structs.replace(TIER, size_bytes=6 * SLOT_BYTES)
    engine = make(store, tier=tier)
    pins = pins_of(engine)
    stored(engine, 1, 2)
    one = pins.pin("a", runs(engine, 1, 2), tier="t0", until_s=FOREVER)
    assert one.done and not one.missing
    press(engine)
    keys = engine.keys(prompt(1, 2))
    assert set(keys) <= set(store._values)
    assert engine.tiers.readable[0].pinned_bytes == sum(len(store._values[key]) for key in keys)
    pins.unpin("a")
    press(engine)
    assert not set(keys) & set(store._values)


def test_a_tier_that_is_not_there(make: Make) -> None:
    engine = make(Scripted())
    with pytest.raises(ConfigError, match="no tier is named 'disk'"):
        pins_of(engine).pin("a", runs(engine, 1, 1), tier="disk", until_s=FOREVER)


def test_the_number_of_pins_is_bounded(make: Make) -> None:
    engine = make(Scripted())
    pins = pins_of(engine)
    for number in range(MAX_PINS):
        pins.pin(f"p{number}", [], tier="t0", until_s=FOREVER)
    with pytest.raises(ConfigError, match=f"there are {MAX_PINS} pins"):
        pins.pin("more", [], tier="t0", until_s=FOREVER)
    pins.pin("p0", [], tier="t0", until_s=FOREVER)
    pins.unpin("p1")
    pins.pin("more", [], tier="t0", until_s=FOREVER)


def test_closing_ends_all(make: Make) -> None:
    engine = make()
    pins = pins_of(engine)
    engine.store(prompt(1, 2), Pages(1))
    one = pins.pin("a", runs(engine, 1, 2), tier="host", until_s=FOREVER)
    until(engine, lambda: one.done)
    assert engine.close() and pins.host_bytes == 0
