"""Prefixes on their way to host: beside the engine, from whoever answers, until the deadline."""

from __future__ import annotations

import threading
import time

import msgspec
from scripted import (
    CHUNK,
    PAYLOAD_BYTES,
    TIER,
    Make,
    Pages,
    Scripted,
    make,
    prompt,
    stored,
    until,
)

from lmcache_core.layout import ChunkLayout
from lmcache_core.misses import MissLog
from lmcache_core.sdk import BackendUnavailable, Capabilities, OpContext

__all__ = ["make"]

PATIENT = msgspec.structs.replace(TIER, deadline_s=5.0)


def soon() -> OpContext:
    return OpContext(deadline_s=time.monotonic() + 1)


def flip_a_bit(store: Scripted, key: bytes) -> None:
    """In the payload, behind the header."""
    value = bytearray(store._values[key])
    value[5000] ^= 1
    store._values[key] = bytes(value)


def test_a_frozen_tier_delays_nothing_that_another_has(make: Make) -> None:
    fast, frozen = Scripted(), Scripted()
    engine = make(fast, frozen)
    tokens = stored(engine, 1, 3)
    frozen.freeze()
    ticket = engine.prefetch(engine.keys(tokens), deadline_s=engine.now_s() + 30)
    until(engine, lambda: ticket.done, limit_s=2)
    assert len(ticket.hits()) == 3
    assert set(ticket.sources.values()) == {"t0"}
    engine.release(ticket)


def test_a_frozen_tier_costs_the_deadline_when_only_it_may_have_the_rest(make: Make) -> None:
    fast, frozen = Scripted(), Scripted()
    engine = make(fast, frozen)
    tokens = stored(engine, 1, 3)
    fast.delete([engine.keys(tokens)[1]], soon())
    frozen.freeze()
    start_s = engine.now_s()
    ticket = engine.prefetch(engine.keys(tokens), deadline_s=start_s + 0.2)
    until(engine, lambda: ticket.done, limit_s=2)
    assert 0.2 <= engine.now_s() - start_s < 0.4
    assert len(ticket.hits()) == 1, "what arrived counts"
    assert ticket.why_missed(1) == "deadline"
    engine.release(ticket)


def test_a_chunk_that_one_tier_fails_to_give_comes_from_the_next(make: Make) -> None:
    first, second = Scripted(), Scripted()
    engine, pages = make(first, second), Pages(1)
    tokens = stored(engine, 1, 3)
    key = engine.keys(tokens)[1]
    flip_a_bit(first, key)
    assert engine.retrieve(tokens, pages) == 12
    assert pages.onboarded == [True] * 3
    assert engine.metrics.snapshot().get("t0.corrupt", 0) <= 1, "or t1 answered first"


def test_the_prefix_ends_where_every_tier_failed_and_says_why(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 3)
    key = engine.keys(tokens)[1]
    flip_a_bit(store, key)
    ticket = engine.prefetch(engine.keys(tokens))
    until(engine, lambda: ticket.done)
    assert len(ticket.hits()) == 1
    assert ticket.why_missed(1) == "corrupt"
    engine.release(ticket)


def test_a_released_ticket_cancels_what_has_not_started(make: Make) -> None:
    class SlowGets(Scripted):
        gate = threading.Event()

        def _enter(self, op: str, width: int) -> None:
            super()._enter(op, width)
            if op == "get":
                self.gate.wait(20)

    store = SlowGets()
    engine = make(store, tier=msgspec.structs.replace(PATIENT, threads=1))
    tokens = stored(engine, 1, 6)
    ticket = engine.prefetch(engine.keys(tokens), deadline_s=engine.now_s() + 30)
    until(engine, lambda: len(ticket.pending) == 6 and store.calls[-1][0] == "get")
    engine.release(ticket)
    store.gate.set()
    until(engine, lambda: not any(engine.is_arriving(key) for key in engine.keys(tokens)))
    assert sum(op == "get" for op, _ in store.calls) == 1, "one had started"
    assert engine.metrics.snapshot()["t0.cancelled"] == 5
    assert engine.host.used_bytes == len(engine.host.keys()) * engine.slot_bytes


def test_a_request_that_joins_a_cancelled_fetch_gets_the_chunk(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=msgspec.structs.replace(PATIENT, threads=1))
    tokens = stored(engine, 1, 4)
    for _ in range(30):
        first = engine.prefetch(engine.keys(tokens), deadline_s=engine.now_s() + 30)
        until(engine, lambda t=first: bool(t.pending) or t.done)
        engine.release(first)
        second = engine.prefetch(engine.keys(tokens), deadline_s=engine.now_s() + 30)
        until(engine, lambda t=second: t.done)
        assert len(second.hits()) == 4
        engine.release(second)
        engine.clear()


def test_what_a_store_lacked_is_not_asked_again_at_once(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=msgspec.structs.replace(TIER, negative_ttl_s=0.2))
    tokens = prompt(1, 3)
    assert engine.lookup(tokens).tokens == 0
    asked = len(store.calls)
    assert engine.lookup(tokens).tokens == 0
    assert len(store.calls) == asked, "the store was asked again"
    engine.runtime.wait(0.25)
    engine.lookup(tokens)
    assert len(store.calls) == asked + 1


def test_what_was_stored_meanwhile_is_found_at_once(make: Make) -> None:
    engine = make(Scripted())
    tokens = prompt(1, 3)
    assert engine.lookup(tokens).tokens == 0
    stored(engine, 1, 3)
    assert engine.lookup(tokens).tokens == 12


def test_what_a_store_evicted_is_stored_again(make: Make) -> None:
    class Evicting(Scripted):
        capabilities = Capabilities(max_concurrency=16, max_batch=128, scan=True, evicts=True)

    store = Evicting()
    engine = make(store, tier=msgspec.structs.replace(TIER, negative_ttl_s=0.001))
    tokens = stored(engine, 1, 2)
    used = engine.tiers.readable[0].used_bytes
    store._values.clear()
    assert engine.retrieve(tokens, Pages(1)) == 0
    assert engine.tiers.readable[0].used_bytes == 0
    stored(engine, 1, 2)
    assert engine.tiers.readable[0].used_bytes == used
    assert len(store._values) == 2


def test_a_dead_store_recovers_while_nobody_asks(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 1)
    store.raises = BackendUnavailable("gone")
    assert engine.retrieve(tokens, Pages(1)) == 0
    assert not engine.tiers.readable[0].available
    store.raises = None
    time.sleep(0.4)  # nobody polls
    assert store.calls[-1][0] == "health"
    engine.poll()
    assert engine.tiers.readable[0].available, "the first request after the recovery waits"
    assert engine.retrieve(tokens, Pages(1)) == 4


def test_why_a_chunk_missed(make: Make) -> None:
    engine, log = make(host_chunks=2), MissLog()
    old, new = prompt(1, 2), prompt(2, 2)
    log.saw(old[:4], engine.namespace)
    engine.store(old, Pages(1))
    engine.store(new, Pages(2))
    ticket = engine.prefetch(engine.keys(old))
    assert engine.why_missed(ticket, 0) == "evicted"
    fresh = prompt(3, 1)
    assert engine.why_missed(engine.prefetch(engine.keys(fresh)), 0) == ""
    assert log.explain(fresh[:4], engine.namespace) == "never_stored"
    tenant = engine.namespace.derive(tenant_salt="a")
    assert log.explain(old[:4], tenant) == "identity.tenant_salt"


def test_a_chunk_of_another_layout_under_the_same_key_is_a_miss(make: Make) -> None:
    engine = make()
    tokens = prompt(1, 2)
    engine.store(tokens, Pages(1))
    other = ChunkLayout(chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"another")
    ticket = engine.prefetch_keys(engine.keys(tokens), layout=other)
    assert ticket.done and not ticket.hits()
    assert engine.why_missed(ticket, 0) == "layout"
    engine.release(ticket)
    assert engine.retrieve(tokens, Pages(1)) == 8
