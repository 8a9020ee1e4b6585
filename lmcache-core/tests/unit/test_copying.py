"""Copies between tiers: what the target is said to hold it holds, byte for byte."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from scripted import LAYOUT, TIER, Make, Pages, Scripted, make, prompt, stored, until
from test_clearing import Held

from lmcache_core.copying import Copying
from lmcache_core.engine import CacheEngine
from lmcache_core.pins import Run
from lmcache_core.sdk import ConfigError, Status, Unsupported

__all__ = ["make"]


def run(engine: CacheEngine, copying: Copying) -> Copying:
    def ended() -> bool:
        copying.step()
        return copying.done

    until(engine, ended)
    assert copying.settled == copying.total
    return copying


def copy(engine: CacheEngine, keys: list[bytes], source: str, target: str) -> Copying:
    return Copying(engine, [Run(keys, LAYOUT)], source=source, target=target)


def read_back(engine: CacheEngine, seed: int, chunks: int, *, store: Scripted) -> list[bool]:
    """Chunks of a prompt from ``store`` alone."""
    keys = engine.keys(prompt(seed, chunks))
    engine.host.drop(keys)
    others = [tier for tier in engine.tiers.readable if tier.connector is not store]
    for tier in others:
        assert isinstance(tier.connector, Scripted)
        tier.connector._values.clear()
    pages = Pages(seed)
    engine.retrieve(prompt(seed, chunks), pages)
    return pages.onboarded


def test_from_one_store_to_another_past_the_host_tier(make: Make) -> None:
    first, second = Scripted(), Scripted()
    engine = make(first, second)
    keys = engine.keys(stored(engine, 1, 5))
    second._values.clear()
    engine.tiers.readable[1].delete(keys)
    until(engine, lambda: not engine.tiers.readable[1].resident())
    done = run(engine, copy(engine, keys, "t0", "t1"))
    assert done.held == keys and not done.failed
    assert engine.host.prefix(keys) == 0, "nothing else is evicted for it"
    assert read_back(engine, 1, 5, store=second) == [True] * 5


def test_from_a_store_to_host_warms_it(make: Make) -> None:
    engine = make(Scripted())
    keys = engine.keys(stored(engine, 1, 4))
    landed: list[bytes] = []
    copying = Copying(
        engine,
        [Run(keys, LAYOUT)],
        source="t0",
        target="host",
        landed=lambda chunk: landed.append(chunk.key),
    )
    run(engine, copying)
    assert engine.host.prefix(keys) == 4
    assert sorted(landed) == sorted(keys) == sorted(copying.held)
    for at, key in enumerate(keys):
        chunk = engine.host.get(key)
        assert chunk is not None and chunk.pins == 0
        assert np.array_equal(engine.host.payload(chunk), Pages(1).content(at))


def test_from_host_to_a_store(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(prompt(1, 3))
    engine.store(prompt(1, 3), Pages(1))
    assert engine.flush(5)
    engine.tiers.readable[0].delete(keys)
    until(engine, lambda: not store._values)
    done = run(engine, copy(engine, keys, "host", "t0"))
    assert done.held == keys
    assert read_back(engine, 1, 3, store=store) == [True] * 3


def test_what_is_there_already_is_not_moved(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(prompt(1, 3))
    engine.store(prompt(1, 3), Pages(1))
    assert engine.flush(5)
    calls = len(store.calls)
    done = run(engine, copy(engine, keys, "host", "t0"))
    assert (len(done.held), done.nbytes, len(store.calls)) == (3, 0, calls)


def test_what_is_on_its_way_counts_only_once_it_is_confirmed(make: Make) -> None:
    store = Held()
    engine = make(store)
    keys = engine.keys(prompt(1, 1))
    engine.store(prompt(1, 1), Pages(1))
    until(engine, store.reached.is_set)
    copying = copy(engine, keys, "host", "t0")
    for _ in range(20):
        engine.poll()
        copying.step()
    assert not copying.done and not copying.held
    store.go.set()
    assert run(engine, copying).held == keys


def test_what_the_source_lacks_is_told(make: Make) -> None:
    engine = make(Scripted(), Scripted())
    keys = engine.keys(prompt(1, 3))
    assert run(engine, copy(engine, keys, "t0", "t1")).failed == {"absent": 3}
    assert run(engine, copy(engine, keys, "host", "t1")).failed == {"absent": 3}


def test_a_damaged_chunk_is_not_passed_on(make: Make) -> None:
    first, second = Scripted(), Scripted()
    engine = make(first, second)
    keys = engine.keys(stored(engine, 1, 3))
    engine.tiers.readable[1].delete(keys)
    until(engine, lambda: not second._values)
    value = bytearray(first._values[keys[1]])
    value[5000] ^= 1
    first._values[keys[1]] = bytes(value)
    done = run(engine, copy(engine, keys, "t0", "t1"))
    assert sorted(done.held) == sorted([keys[0], keys[2]])
    assert sum(done.failed.values()) == 1 and keys[1] not in second._values


def test_a_full_target_is_told(make: Make) -> None:
    class Full(Scripted):
        def put_from(self, keys, sources, ctx):  # type: ignore[no-untyped-def]
            return [Status.REJECTED] * len(keys)

    engine = make(Scripted(), Full())
    keys = engine.keys(stored(engine, 1, 2))
    assert run(engine, copy(engine, keys, "t0", "t1")).failed == {"rejected": 2}
    assert engine.host.used_bytes == 0


def test_abandoned_memory_stays_out_of_use(make: Make) -> None:
    store = Scripted()
    engine = make(store, Scripted())
    keys = engine.keys(stored(engine, 1, 1))
    engine.tiers.readable[1].delete(keys)
    until(engine, lambda: not engine.tiers.readable[1].resident())
    store.abandon = []
    assert run(engine, copy(engine, keys, "t0", "t1")).failed == {"abandoned": 1}
    assert engine.host.lost_bytes > 0
    for buffer in store.abandon:
        engine.released(buffer.token)
    until(engine, lambda: engine.host.lost_bytes == 0)


def test_cancelled_it_ends_with_what_it_has(make: Make) -> None:
    engine = make(Scripted(), Scripted(), host_chunks=16)
    keys = engine.keys(stored(engine, 1, 12))
    engine.tiers.readable[1].delete(keys)
    until(engine, lambda: not engine.tiers.readable[1].resident())
    copying = copy(engine, keys, "t0", "t1")
    copying.cancel()
    run(engine, copying)
    assert copying.failed["cancelled"] + len(copying.held) == 12


def test_wrong_tiers_are_refused(make: Make) -> None:
    engine = make(Scripted())
    for source, target in (("host", "host"), ("t0", "t0"), ("disk", "t0"), ("t0", "disk")):
        with pytest.raises(ConfigError):
            copy(engine, [], source, target)


def test_a_tier_that_is_only_read_is_no_target(make: Make) -> None:
    engine = make(Scripted(), tier=msgspec.structs.replace(TIER, write="never"))
    with pytest.raises(Unsupported, match="only read"):
        copy(engine, [], "host", "t0")


def test_host_to_host_finds_what_is_there_to_be_held(make: Make) -> None:
    """How chunks that another engine is to read are kept for it."""
    engine = make(Scripted())
    keys = engine.keys(prompt(1, 3))
    engine.store(prompt(1, 2), Pages(1))
    landed: list[bytes] = []
    copying = Copying(
        engine,
        [Run(keys, LAYOUT)],
        source="host",
        target="host",
        landed=lambda chunk: landed.append(chunk.key),
    )
    run(engine, copying)
    assert landed == copying.held == keys[:2] and copying.failed == {"absent": 1}
