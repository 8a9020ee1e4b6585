"""Clearing: what was there when it began is not served after its end, and nothing else goes."""

from __future__ import annotations

import dataclasses
import threading

import msgspec
import pytest
from scripted import LAYOUT, SLOT_BYTES, TIER, Make, Pages, Scripted, make, prompt, stored, until

from lmcache_core.clearing import Clearing
from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.engine import CacheEngine
from lmcache_core.keys import Namespace
from lmcache_core.sdk import Capabilities, Sharing, Status

__all__ = ["make"]
OTHER = Namespace.of({"model": "another"})
SMALL_TIER = msgspec.structs.replace(TIER, size_bytes=SLOT_BYTES, deadline_s=5.0)


def put_other(engine: CacheEngine, seed: int, chunks: int) -> list[bytes]:
    """A prompt of another namespace, in every tier."""
    keys = engine.keys(prompt(seed, chunks), engine.hasher(OTHER))
    slots = []
    for at, key in enumerate(keys):
        chunk = engine.reserve(key, keys[at - 1] if at else None)
        assert chunk is not None
        engine.host.payload(chunk)[:] = Pages(seed).content(at)
        slots.append(chunk)
    engine.commit(slots)
    assert engine.flush(5)
    return keys


def run(engine: CacheEngine, clearing: Clearing) -> Clearing:
    def ended() -> bool:
        clearing.step()
        return clearing.done

    until(engine, ended)
    assert clearing.settled == clearing.total
    return clearing


def found(engine: CacheEngine, keys: list[bytes]) -> list[bool]:
    """Whether each key can still be fetched from anywhere."""
    answers = []
    for key in keys:
        ticket = engine.prefetch_keys([key], layout=LAYOUT, deadline_s=engine.now_s() + 1)
        until(engine, lambda ticket=ticket: ticket.done)  # type: ignore[misc]
        answers.append(bool(ticket.hits()))
        engine.release(ticket)
    return answers


def test_one_namespace_goes_everywhere_and_another_stays(make: Make) -> None:
    engine = make(Scripted(), Scripted(), host_chunks=16)
    mine = engine.keys(prompt(1, 3))
    engine.store(prompt(1, 3), Pages(1))
    others = put_other(engine, 2, 3)
    done = run(engine, Clearing(engine, tags=[engine.namespace.tag]))
    assert (done.deleted, done.failed) == (9, {}), "three chunks in three tiers"
    assert found(engine, mine) == [False] * 3
    assert found(engine, others) == [True] * 3


def test_one_tier_alone(make: Make) -> None:
    first, second = Scripted(), Scripted()
    engine = make(first, second)
    keys = engine.keys(prompt(1, 2))
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    run(engine, Clearing(engine, tiers=["t0"]))
    assert not first._values and len(second._values) == 2
    assert engine.host.prefix(keys) == 2


def test_single_keys(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(prompt(1, 4))
    engine.store(prompt(1, 4), Pages(1))
    assert engine.flush(5)
    done = run(engine, Clearing(engine, keys=keys[2:]))
    assert done.deleted == 4
    assert found(engine, keys) == [True, True, False, False]


def test_what_an_earlier_process_stored_goes_by_its_tag(make: Make) -> None:
    """The store is shared and unbounded, so nobody has listed it at the start."""
    store = Shared()
    earlier = make(store)
    stored(earlier, 1, 3)
    others = put_other(earlier, 2, 2)
    engine = make(store)
    assert engine.tiers.readable[0].used_bytes == 0, "it knows of nothing there"
    done = run(engine, Clearing(engine, tags=[engine.namespace.tag]))
    assert done.deleted == 3
    assert sorted(store._values) == sorted(others)


def test_keys_of_strangers_in_the_same_store_stay(make: Make) -> None:
    store = Shared()
    engine = make(store)
    store._values[b"somebody's"] = b"value"
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    run(engine, Clearing(engine))
    assert list(store._values) == [b"somebody's"]


def test_a_put_that_is_on_its_way_is_deleted_behind_itself(make: Make) -> None:
    store = Held()
    engine = make(store)
    keys = engine.keys(prompt(1, 1))
    engine.store(prompt(1, 1), Pages(1))
    until(engine, store.reached.is_set)
    clearing = Clearing(engine, tags=[engine.namespace.tag])
    for _ in range(5):
        engine.poll()
        clearing.step()
    assert not clearing.done, "the put may still land"
    store.go.set()
    run(engine, clearing)
    assert not store._values
    assert found(engine, keys) == [False]


def test_a_put_that_has_not_begun_is_taken_back(make: Make) -> None:
    store = SlowDelete()
    engine = make(store, tier=SMALL_TIER)
    engine.store(prompt(1, 1), Pages(1))
    assert engine.flush(5)
    engine.store(prompt(2, 1), Pages(2))  # waits for the delete of the first
    until(engine, store.reached.is_set)
    clearing = Clearing(engine)
    store.go.set()
    run(engine, clearing)
    assert engine.flush(5)
    assert not store._values and engine.unstored == 0, "taken back is no failure"


def test_a_chunk_that_is_being_written_is_never_served(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(prompt(1, 2))
    slots = [engine.reserve(key, None) for key in keys]
    run(engine, Clearing(engine, tags=[engine.namespace.tag]))
    engine.commit([slot for slot in slots if slot is not None])
    assert engine.flush(5)
    assert engine.host.prefix(keys) == 0 and not store._values


def test_a_chunk_that_arrives_from_the_tier_meanwhile_goes_too(make: Make) -> None:
    store = Gate()
    engine = make(store)
    keys = engine.keys(stored(engine, 1, 1))
    store.go.clear()
    ticket = engine.prefetch_keys(keys, layout=LAYOUT, deadline_s=engine.now_s() + 5)
    until(engine, store.reached.is_set)
    clearing = Clearing(engine, tags=[engine.namespace.tag])
    store.go.set()
    run(engine, clearing)
    until(engine, lambda: ticket.done)
    engine.release(ticket)
    assert found(engine, keys) == [False]


def test_what_is_stored_after_its_end_stays(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(prompt(1, 2))
    engine.store(prompt(1, 2), Pages(1))
    run(engine, Clearing(engine, tags=[engine.namespace.tag]))
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    engine.host.drop(keys)
    assert found(engine, keys) == [True, True]


def test_a_store_that_refuses_is_told_and_the_rest_is_done(make: Make) -> None:
    class Stubborn(Scripted):
        def delete(self, keys, ctx):  # type: ignore[no-untyped-def]
            return [Status.REJECTED] * len(keys)

    store = Stubborn()
    engine = make(store)
    keys = engine.keys(prompt(1, 2))
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    done = run(engine, Clearing(engine))
    assert done.failed == {"not_deleted": 2} and done.deleted == 2
    assert engine.host.prefix(keys) == 0


def test_a_dead_store_ends_the_order_within_its_deadline(make: Make) -> None:
    class Dying(Scripted):
        def delete(self, keys, ctx):  # type: ignore[no-untyped-def]
            raise OSError("gone")

    engine = make(Dying())
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    done = run(engine, Clearing(engine))
    assert done.failed["not_deleted"] == 2


def test_a_shared_store_that_can_not_list_says_so(make: Make) -> None:
    engine = make(Unlisted())
    done = run(engine, Clearing(engine))
    assert done.failed == {"not_listed": 1}


def test_cancelled_it_starts_nothing_more(make: Make) -> None:
    store = Held()
    engine = make(store)
    engine.store(prompt(1, 1), Pages(1))
    until(engine, store.reached.is_set)
    clearing = Clearing(engine)
    clearing.cancel()
    store.go.set()
    run(engine, clearing)
    assert clearing.failed.get("cancelled") == 1, "the one in host"


@pytest.mark.parametrize("count", [0, 1, 1500, 5000])
def test_any_number_of_chunks_in_host(make: Make, count: int) -> None:
    engine = make(host_chunks=max(8, count + 1))
    keys = [engine.namespace.tag + number.to_bytes(38, "little") for number in range(count)]
    for key in keys:
        chunk = engine.reserve(key, None)
        assert chunk is not None
        engine.commit([chunk])
    done = run(engine, Clearing(engine))
    assert done.deleted == count and not engine.host.keys()


class Shared(Scripted):
    """A store of several processes, which is not listed at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = cluster(self.capabilities)


class Unlisted(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.capabilities = cluster(self.capabilities, scan=False)


class Held(Scripted):
    """A store whose first put lands only when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def put_from(self, keys, sources, ctx):  # type: ignore[no-untyped-def]
        first = not self.reached.is_set()
        self.reached.set()
        if first:
            assert self.go.wait(5)
        return MemoryConnector.put_from(self, keys, sources, ctx)


class SlowDelete(Scripted):
    """A store whose deletes wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def delete(self, keys, ctx):  # type: ignore[no-untyped-def]
        self.reached.set()
        assert self.go.wait(5)
        return MemoryConnector.delete(self, keys, ctx)


class Gate(Scripted):
    """A store whose gets wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()
        self.go.set()

    def get_into(self, keys, targets, ctx):  # type: ignore[no-untyped-def]
        answers = MemoryConnector.get_into(self, keys, targets, ctx)
        if not self.go.is_set():
            self.reached.set()
            assert self.go.wait(5)
        return answers


def cluster(capabilities: Capabilities, *, scan: bool = True) -> Capabilities:
    return dataclasses.replace(capabilities, sharing=Sharing.CLUSTER, scan=scan)
