"""The cache engine over a connector that misbehaves on demand, on real threads and time."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
from scripted import (
    CHUNK,
    SLOT_BYTES,
    TIER,
    Make,
    Pages,
    Scripted,
    make,
    prompt,
    stored,
    until,
)

from lmcache_core.engine import LookupResult
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    OpContext,
)

__all__ = ["make"]


def test_what_was_stored_comes_back_from_host(make: Make) -> None:
    engine, pages, tokens = make(), Pages(1), prompt(1, 3)
    assert engine.store([*tokens, 1, 2], pages) == 3, "the partial last chunk is not stored"
    assert engine.lookup(tokens) == LookupResult(12, {"host": 12})
    assert engine.retrieve([*tokens, 9], pages) == 12
    assert pages.onboarded == [True] * 3


def test_lookup_asks_each_tier_once_for_all_chunks(make: Make) -> None:
    first, second = Scripted(), Scripted()
    engine = make(first, second)
    tokens = stored(engine, 1, 4)
    first.delete([engine.keys(tokens)[2]], OpContext(deadline_s=time.monotonic() + 1))
    first.calls.clear()
    second.calls.clear()
    assert engine.lookup(tokens) == LookupResult(16, {"t0": 12, "t1": 4})
    assert first.calls == second.calls == [("exists", 4)]


def test_the_first_missing_chunk_ends_the_prefix(make: Make) -> None:
    store = Scripted()
    engine, pages = make(store), Pages(1)
    tokens = stored(engine, 1, 4)
    store.delete([engine.keys(tokens)[1]], OpContext(deadline_s=time.monotonic() + 1))
    assert engine.retrieve(tokens, pages) == CHUNK
    assert pages.onboarded == [True]


def test_a_prefix_may_alternate_between_host_and_lower_tiers(make: Make) -> None:
    store = Scripted()
    engine, pages = make(store), Pages(1)
    tokens = prompt(1, 4)
    engine.store(tokens, pages)
    assert engine.flush(5)
    keys = engine.keys(tokens)
    engine.host.drop([keys[0], keys[2]])
    store.delete([keys[1], keys[3]], OpContext(deadline_s=time.monotonic() + 1))
    assert engine.lookup(tokens) == LookupResult(16, {"t0": 8, "host": 8})
    assert engine.retrieve(tokens, pages) == 16
    assert pages.onboarded == [True] * 4


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_value_is_a_miss_counted_and_removed(make: Make, damage: str) -> None:
    store = Scripted()
    engine, pages = make(store), Pages(1)
    tokens = stored(engine, 1, 2)
    keys = engine.keys(tokens)
    value = bytearray(store._values[keys[0]])
    if damage == "flip":
        value[6000] ^= 4
    elif damage == "cut":
        del value[5000:]
    else:
        value = bytearray(store._values[keys[1]])
    store._values[keys[0]] = bytes(value)
    assert engine.retrieve(tokens, pages) == 0
    assert pages.onboarded == []
    assert engine.metrics.snapshot()["t0.corrupt"] == 1
    until(engine, lambda: keys[0] not in store._values)


def test_a_chunk_that_is_computed_anew_waits_until_its_damaged_value_is_deleted(make: Make) -> None:
    """A put beside that delete could be undone by it."""
    store = Scripted()
    engine = make(store, tier=msgspec.structs.replace(TIER, deadline_s=5.0))
    tokens = stored(engine, 1, 1)
    (key,) = engine.keys(tokens)
    store._values[key] = store._values[key][:100]
    deletes, delete = threading.Event(), store.delete
    store.delete = lambda keys, ctx: (deletes.wait(5), delete(keys, ctx))[1]  # type: ignore[method-assign]
    assert engine.retrieve(tokens, Pages(1)) == 0
    engine.store(tokens, Pages(1))
    assert sum(width for op, width in store.calls if op == "put") == 1
    deletes.set()
    assert engine.flush(5)
    assert len(store._values[key]) == SLOT_BYTES
    engine.clear()
    assert engine.retrieve(tokens, Pages(1)) == len(tokens)


def test_a_frozen_store_costs_one_deadline_and_the_next_request_nothing(make: Make) -> None:
    store = Scripted()
    engine, pages = make(store), Pages(1)
    tokens = stored(engine, 1, 2)
    store.freeze()
    start = time.monotonic()
    assert engine.retrieve(tokens, pages) == 0
    assert time.monotonic() - start < 0.3 + 0.5
    until(engine, lambda: not engine.tiers.readable[0].available, 2.0)
    ticket = engine.prefetch(engine.keys(tokens))
    assert ticket.done, "decided at once while the breaker is open"
    assert ticket.hits() == []
    engine.release(ticket)

    store.thawed.set()
    until(engine, lambda: engine.tiers.readable[0].available)
    assert engine.retrieve(tokens, pages) == 2 * CHUNK, "it recovers by itself"
    assert pages.onboarded == [True, True]


def test_a_long_queue_of_stores_is_no_fault_of_the_store(make: Make) -> None:
    class Slow(Scripted):
        def _enter(self, op: str, width: int) -> None:
            super()._enter(op, width)
            if op == "put":
                time.sleep(0.06)

    store = Slow()
    engine = make(store, tier=msgspec.structs.replace(TIER, threads=1))
    engine.store(prompt(1, 8), Pages(1))
    assert engine.flush(5)
    assert len(store._values) == 8, "the last one waited longer than the deadline"
    assert "t0.breaker_opened" not in engine.metrics.snapshot()


def test_an_unavailable_backend_opens_the_breaker_at_once(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 1)
    store.raises = BackendUnavailable("gone", backend="test")
    assert engine.lookup(tokens).tokens == 0
    assert not engine.tiers.readable[0].available
    assert "gone" in engine.tiers.readable[0].unavailable_reason
    assert engine.metrics.snapshot()["t0.error.BackendUnavailable"] == 1


def test_a_foreign_exception_is_a_counted_miss(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 1)
    store.raises = KeyError("surprise")
    assert engine.retrieve(tokens, Pages(1)) == 0
    assert engine.metrics.snapshot()["t0.error.LMCacheError"] >= 1


def test_memory_of_an_abandoned_get_is_not_reused_until_released(make: Make) -> None:
    store = Scripted()
    engine = make(store, host_chunks=2)
    tokens = stored(engine, 1, 1)
    store.abandon = []
    assert engine.retrieve(tokens, Pages(1)) == 0
    assert engine.host.lost_bytes == SLOT_BYTES
    assert not engine.tiers.readable[0].available
    other = prompt(2, 2)
    assert engine.store(other, Pages(2)) == 1, "one of two slots is lost"
    view = store.abandon[0].view
    assert view is not None
    view[:] = bytes(len(view))  # the late write of native code
    pages = Pages(2)
    assert engine.retrieve(other, pages) == CHUNK
    assert pages.onboarded == [True]
    engine.released(store.abandon[0].token)
    engine.poll()
    assert engine.host.lost_bytes == 0


def test_memory_of_an_abandoned_put_stays_until_released(make: Make) -> None:
    store = Scripted()
    engine = make(store, host_chunks=1)
    store.abandon = []
    engine.store(prompt(1, 1), Pages(1))
    assert engine.flush(5)
    assert engine.store(prompt(2, 1), Pages(2)) == 0, "the slot is still lent"
    engine.released(store.abandon[0].token)
    engine.poll()
    assert engine.store(prompt(2, 1), Pages(2)) == 1


def test_a_tier_that_holds_too_much_lost_memory_is_not_used(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=msgspec.structs.replace(TIER, max_lost_bytes=0))
    tokens = stored(engine, 1, 1)
    store.abandon = []
    engine.retrieve(tokens, Pages(1))
    until(engine, lambda: not engine.tiers.readable[0].unavailable_reason)
    assert not engine.tiers.readable[0].available
    engine.released(store.abandon[0].token)
    engine.poll()
    assert engine.tiers.readable[0].available


def test_close_is_bounded_while_a_store_is_frozen(make: Make) -> None:
    store = Scripted()
    engine = make(store, close_timeout_s=0.3)
    store.freeze()
    engine.store(prompt(1, 2), Pages(1))
    start = time.monotonic()
    assert engine.close() is False
    assert time.monotonic() - start < 4.0
    with pytest.raises(BackendClosed):
        engine.lookup(prompt(1, 1))


def test_close_is_bounded_when_the_connectors_own_close_hangs_or_raises(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_core.tiers.calls.CLOSE_LIMIT_S", 0.1)
    gate = threading.Event()

    class Hanging(Scripted):
        def close(self) -> None:
            gate.wait(20)

    class Raising(Scripted):
        def close(self) -> None:
            raise RuntimeError("no")

    engine = make(Hanging(), Raising(), close_timeout_s=0.3)
    start = time.monotonic()
    assert engine.close() is False
    assert time.monotonic() - start < 3.0
    gate.set()
    counted = engine.metrics.snapshot()
    assert (counted["t0.close_overdue"], counted["t1.close_failed"]) == (1, 1)


def test_the_request_end_never_waits_for_lower_tiers(make: Make) -> None:
    store = Scripted()
    engine, pages = make(store), Pages(1)
    store.freeze()
    assert engine.store(prompt(1, 2), pages) == 2
    assert engine.retrieve(prompt(1, 2), pages) == 2 * CHUNK, "host serves it meanwhile"
    store.thawed.set()
    assert engine.flush(5)
    assert len(store._values) == 2


def test_a_full_host_evicts_the_oldest_suffix_and_drops_when_all_is_pinned(make: Make) -> None:
    engine = make(host_chunks=4)
    engine.store(prompt(1, 3), Pages(1))
    assert engine.pin(prompt(1, 3)) == 12
    assert engine.store(prompt(2, 2), Pages(2)) == 1
    assert engine.metrics.snapshot()["host.store_dropped"] == 1
    assert engine.unpin(prompt(1, 3)) == 12
    assert engine.store(prompt(3, 2), Pages(3)) == 2
    left = engine.lookup(prompt(1, 3)).tokens
    assert left in (4, 8), "the head of the chain outlives its tail"


def test_a_store_reserved_before_a_clear_is_not_served_after(make: Make) -> None:
    engine = make()
    key = engine.keys(prompt(1, 1))[0]
    chunk = engine.reserve(key, None)
    assert chunk is not None
    engine.clear()
    engine.commit([chunk])
    assert engine.lookup(prompt(1, 1)).tokens == 0
    assert engine.host.used_bytes == 0


def test_the_lower_tier_never_holds_more_than_its_size(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=msgspec.structs.replace(TIER, size_bytes=3 * SLOT_BYTES))
    for seed in range(6):
        engine.store(prompt(seed, 2), Pages(seed))
        assert engine.flush(5)
        until(engine, lambda: not engine.tiers.settling)
    assert store.peak_bytes <= 3 * SLOT_BYTES
    assert engine.tiers.readable[0].used_bytes == sum(map(len, store._values.values()))
    assert engine.metrics.snapshot()["t0.evicted"] > 0


def test_a_chunk_on_its_way_to_a_tier_is_not_sent_again(make: Make) -> None:
    store = Scripted()
    config = msgspec.structs.replace(TIER, size_bytes=2 * SLOT_BYTES, deadline_s=5.0)
    engine = make(store, tier=config)
    store.freeze()
    for _ in range(3):
        engine.store(prompt(1, 2), Pages(1))
        engine.clear()
    store.thawed.set()
    assert engine.flush(5)
    assert sum(width for op, width in store.calls if op == "put") == 2
    assert store.peak_bytes <= 2 * SLOT_BYTES


def test_what_an_earlier_process_left_is_counted_and_trimmed(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    stored(engine, 1, 4)
    config = msgspec.structs.replace(TIER, size_bytes=2 * SLOT_BYTES)
    again = make(store, tier=config)
    tier = again.tiers.readable[0]
    tier.recover()
    until(again, lambda: not again.tiers.settling)
    assert tier.used_bytes == sum(map(len, store._values.values())) == 2 * SLOT_BYTES


def test_clear_of_lower_tiers_removes_this_namespace_only(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    stored(engine, 1, 2)
    store._values[b"foreign"] = b"kept"
    engine.clear(lower_tiers=True)
    until(engine, lambda: list(store._values) == [b"foreign"])


def test_another_namespace_finds_nothing(make: Make) -> None:
    engine = make()
    engine.store(prompt(1, 2), Pages(1))
    engine.rebase(engine.namespace.derive(tenant_salt="b"))
    assert engine.lookup(prompt(1, 2)).tokens == 0


def test_two_requests_for_one_prefix_fetch_it_once(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    keys = engine.keys(stored(engine, 1, 2))
    store.calls.clear()
    tickets = [engine.prefetch(keys) for _ in range(2)]
    until(engine, lambda: all(ticket.done for ticket in tickets))
    assert [len(ticket.hits()) for ticket in tickets] == [2, 2]
    assert [op for op, _ in store.calls].count("get") == 2
    for ticket in tickets:
        engine.release(ticket)
        engine.release(ticket)
    assert all(engine.host.get(key).pins == 0 for key in keys)  # type: ignore[union-attr]
