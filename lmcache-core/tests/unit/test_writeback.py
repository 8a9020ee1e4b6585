"""Tiers with ``write: on_evict``: written before host evicts, and not before."""

from __future__ import annotations

import msgspec
import pytest
from scripted import SLOT_BYTES, TIER, Make, Pages, Scripted, make, prompt, until

from lmcache_core.engine import CacheEngine
from lmcache_core.sdk import BackendUnavailable

__all__ = ["make"]
ON_EVICT = msgspec.structs.replace(TIER, write="on_evict")
HOST_CHUNKS = 16
AHEAD = HOST_CHUNKS // 8


def store(engine: CacheEngine, seed: int, chunks: int = 1) -> list[bytes]:
    engine.store(prompt(seed, chunks), Pages(seed))
    engine.poll()
    return engine.keys(prompt(seed, chunks))


def fill(engine: CacheEngine, chunks: int, start: int = 1) -> list[bytes]:
    return [store(engine, seed)[0] for seed in range(start, start + chunks)]


def counted(engine: CacheEngine, name: str) -> int:
    return engine.metrics.snapshot().get(name, 0)


def written(engine: CacheEngine, disk: Scripted) -> set[bytes]:
    assert engine.flush(5)
    return set(disk._values)


def test_nothing_is_written_while_there_is_room(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    fill(engine, HOST_CHUNKS - AHEAD)
    assert not written(engine, disk)
    assert engine.metrics.gauges()["host.unwritten_chunks"] == HOST_CHUNKS - AHEAD


def test_the_oldest_are_written_and_what_was_evicted_comes_back(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    keys: list[bytes] = []
    for seed in range(1, 41):
        keys += store(engine, seed)
        expected = max(0, len(keys) - (HOST_CHUNKS - AHEAD))
        assert written(engine, disk) == set(keys[:expected])
    assert counted(engine, "host.evicted") == 40 - HOST_CHUNKS
    assert counted(engine, "host.evicted_unwritten") == 0
    pages = Pages(1)
    until(engine, lambda: engine.lookup(prompt(1, 1)).tokens > 0)
    assert engine.retrieve(prompt(1, 1), pages) and pages.onboarded == [True]


def test_a_chunk_that_is_used_has_a_second_chance(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    keys = fill(engine, HOST_CHUNKS - AHEAD)
    engine.host.touch(keys[:1])
    fill(engine, 2, start=100)
    assert written(engine, disk) == set(keys[1:3])


def test_what_came_from_the_tier_is_not_written_again(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    fill(engine, 30)
    assert engine.flush(5)
    until(engine, lambda: engine.lookup(prompt(1, 1)).tokens > 0)
    puts = sum(width for op, width in disk.calls if op == "put")
    known = set(disk._values)
    fill(engine, HOST_CHUNKS, start=200)
    assert engine.flush(5)
    assert sum(width for op, width in disk.calls if op == "put") - puts == len(
        set(disk._values) - known
    )


def test_a_dropped_chunk_is_never_written(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    keys = fill(engine, 4)
    engine.drop(keys[:2])
    fill(engine, HOST_CHUNKS, start=100)
    assert written(engine, disk) & set(keys) == set(keys[2:])


def test_what_is_being_cleared_is_looked_at_once_a_turn_and_not_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    free = engine.bar_writes(lambda key: True)
    keys = fill(engine, HOST_CHUNKS)
    looks: list[bytes] = []
    last_use = engine.host.last_use

    def counted_use(key: bytes) -> int:
        looks.append(key)
        return last_use(key)

    monkeypatch.setattr(engine.host, "last_use", counted_use)
    engine.poll()
    assert len(looks) == len(keys) and not written(engine, disk)
    free()
    engine.poll()
    assert written(engine, disk) == set(keys[:AHEAD])


def test_faster_than_the_tier_is_counted_and_costs_no_wait(make: Make) -> None:
    disk = Scripted()
    engine = make(
        disk, tier=msgspec.structs.replace(ON_EVICT, deadline_s=20.0), host_chunks=HOST_CHUNKS
    )
    disk.freeze()
    keys = fill(engine, 3 * HOST_CHUNKS)
    assert counted(engine, "host.evicted_unwritten") > 0
    # What is on its way is pinned, and all the others can go.
    assert sum(key in engine.host for key in keys[-HOST_CHUNKS + AHEAD :]) == HOST_CHUNKS - AHEAD
    disk.thawed.set()
    assert engine.flush(5)


def test_a_tier_that_is_down_does_not_keep_host_from_evicting(make: Make) -> None:
    disk = Scripted()
    disk.raises = BackendUnavailable("down", backend="test", op="put", hint="wait")
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS)
    keys = fill(engine, 3 * HOST_CHUNKS)
    assert engine.flush(5)
    assert all(key in engine.host for key in keys[-HOST_CHUNKS + AHEAD :])


def test_the_rest_is_written_when_the_engine_closes(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=200)
    keys = fill(engine, 150)
    assert not disk._values
    assert engine.close()
    assert sum(width for op, width in disk.calls if op == "put") == len(keys)
    assert counted(engine, "close.unflushed") == 0


def test_closing_beside_a_frozen_tier_ends_in_time_and_counts_what_is_lost(make: Make) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS, close_timeout_s=0.3)
    fill(engine, 5)
    disk.freeze()
    assert not engine.close()
    assert counted(engine, "close.unflushed") == 5


def test_through_and_on_evict_side_by_side(make: Make) -> None:
    remote, disk = Scripted(), Scripted()
    engine = make(remote, disk, tier=TIER, host_chunks=HOST_CHUNKS)
    assert engine.tiers.through == engine.tiers.writable and not engine.tiers.on_evict
    fill(engine, 4)
    assert engine.flush(5)
    assert len(remote._values) == len(disk._values) == 4


@pytest.mark.parametrize("ahead", [SLOT_BYTES, 8 * SLOT_BYTES])
def test_how_far_ahead_is_set(make: Make, ahead: int) -> None:
    disk = Scripted()
    engine = make(disk, tier=ON_EVICT, host_chunks=HOST_CHUNKS, write_ahead_bytes=ahead)
    keys = fill(engine, HOST_CHUNKS)
    assert written(engine, disk) == set(keys[: ahead // SLOT_BYTES])
