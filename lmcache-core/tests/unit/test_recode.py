"""Chunks of a tier in another form, on demand: there in one form or the other at every moment."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from scripted import TIER, Make, Scripted, make, prompt, until
from test_encoding import LAYOUT, PAYLOAD_BYTES, content, counter, fetched, store_chunks
from toy_codecs import Lossless, Rounding, Toy, holding

from lmcache_core import envelope
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.recode import Recode
from lmcache_core.sdk import Capabilities, ConfigError, OnExisting, Status, Unsupported

__all__ = ["make"]


def codec_of(store: Scripted, key: bytes) -> str:
    header = envelope.read_header(memoryview(store._values[key]))
    assert isinstance(header, envelope.Header)
    return header.codec


def carried_out(engine: CacheEngine, order: Recode) -> Recode:
    until(engine, lambda: order.done, limit_s=5.0)
    return order


def test_a_prefix_is_compressed_and_decompressed(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys, others = store_chunks(engine, 1, 3), store_chunks(engine, 2, 2)
    raw_bytes = 3 * stored_bytes(PAYLOAD_BYTES)

    order = carried_out(engine, engine.compress(prompt(1, 3), tier="t0", codec="toy"))
    assert (order.total, order.recoded, order.failed) == (3, 3, {})
    assert [codec_of(store, key) for key in keys] == ["toy"] * 3
    assert [codec_of(store, key) for key in others] == [""] * 2
    stored = sum(len(store._values[key]) for key in keys)
    assert (order.before_bytes, order.after_bytes) == (raw_bytes, stored)
    assert engine.tiers.readable[0].used_bytes == sum(map(len, store._values.values()))
    assert fetched(engine, keys) == [True] * 3

    order = carried_out(engine, engine.decompress(prompt(1, 3), tier="t0"))
    assert order.recoded == 3
    assert [codec_of(store, key) for key in keys] == [""] * 3
    assert order.after_bytes == raw_bytes
    assert fetched(engine, keys) == [True] * 3


def test_a_whole_tier_is_compressed(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()), host_chunks=12)
    keys = store_chunks(engine, 1, 4) + store_chunks(engine, 2, 4)
    order = carried_out(engine, engine.compress(tier="t0", codec="toy"))
    assert order.recoded == 8
    assert {codec_of(store, key) for key in keys} == {"toy"}


def test_what_was_used_lately_is_left_alone(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    old = store_chunks(engine, 1, 2)
    until(engine, lambda: engine.now_s() > start_s + 0.2) if (start_s := engine.now_s()) else None
    new = store_chunks(engine, 2, 2)
    order = carried_out(engine, engine.compress(tier="t0", codec="toy", unused_for_s=0.15))
    assert order.total == 2
    assert [codec_of(store, key) for key in (*old, *new)] == ["toy", "toy", "", ""]


def test_a_chunk_that_has_the_form_is_not_written_again(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    store_chunks(engine, 1, 2)
    carried_out(engine, engine.compress(tier="t0", codec="toy"))
    puts = counter(engine, "t0.stored")
    order = carried_out(engine, engine.compress(tier="t0", codec="toy"))
    assert (order.unchanged, order.recoded) == (2, 0)
    assert counter(engine, "t0.stored") == puts


def test_absent_and_corrupt_chunks_are_told(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 3)
    del store._values[keys[0]]
    value = bytearray(store._values[keys[1]])
    value[9000] ^= 1
    store._values[keys[1]] = bytes(value)
    order = carried_out(engine, engine.compress(prompt(1, 3), tier="t0", codec="toy"))
    assert (order.absent, order.recoded, order.failed) == (1, 1, {"payload_checksum": 1})
    assert order.settled == order.total == 3


@pytest.mark.parametrize("instead", [Status.FAILED, Status.TIMED_OUT, Status.REJECTED])
def test_a_put_that_fails_leaves_the_chunk(make: Make, instead: Status) -> None:
    class Refusing(Scripted):
        refuses = False

        def put_from(self, keys, sources, ctx):  # type: ignore[no-untyped-def]
            if self.refuses:
                return [instead] * len(keys)
            return super().put_from(keys, sources, ctx)

    store = Refusing()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 1)
    store.refuses = True
    order = carried_out(engine, engine.compress(tier="t0", codec="toy"))
    assert order.failed == {instead.value: 1}
    engine.flush(1.0)
    assert codec_of(store, keys[0]) == ""
    assert engine.tiers.readable[0].used_bytes >= len(store._values[keys[0]])


def test_host_memory_comes_back_whatever_happens(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 3)
    engine.host.drop(keys)
    before = engine.host.used_bytes
    for codec in ("toy", "", "toy"):
        carried_out(engine, engine.compress(tier="t0", codec=codec))
    store.raises = OSError("gone")
    order = carried_out(engine, engine.decompress(tier="t0"))
    assert sum(order.failed.values()) == 3
    assert engine.host.used_bytes == before


def test_an_order_that_is_cancelled_ends_with_what_is_on_its_way(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()), host_chunks=12)
    store_chunks(engine, 1, 6)
    store.freeze()
    order = engine.compress(tier="t0", codec="toy")
    order.cancel()
    store.thawed.set()
    carried_out(engine, order)
    assert order.failed["cancelled"] == 4
    assert order.settled == 6


def test_a_chunk_that_is_dropped_meanwhile_does_not_come_back(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 1)
    tier = engine.tiers.readable[0]
    chunk = engine.host.borrow(keys[0], None, LAYOUT)
    assert chunk is not None
    told: list[Status | None] = []
    tier.fetch(chunk, lambda status, why: told.append(status))
    until(engine, lambda: told == [Status.OK])
    engine.drop(keys)
    tier.rewrite(chunk, tier.way("toy", ""), told.append)
    until(engine, lambda: len(told) == 2)
    assert told[1] is Status.MISS
    engine.host.abort(chunk)
    until(engine, lambda: keys[0] not in store._values)


def test_loads_go_on_while_a_tier_is_recoded(make: Make) -> None:
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()), host_chunks=16)
    keys = store_chunks(engine, 1, 6)
    order = engine.compress(tier="t0", codec="toy")
    assert fetched(engine, keys) == [True] * 6
    carried_out(engine, order)
    assert fetched(engine, keys) == [True] * 6


def test_a_lossy_form_is_within_its_bound_and_lossless_where_it_is_not(make: Make) -> None:
    store, lossy = Scripted(), Rounding()
    engine = make(store, layout=LAYOUT, codecs=holding(lossy, Lossless()))
    keys = store_chunks(engine, 1, 2)
    lossy.error = 0.15
    carried_out(engine, engine.compress(tier="t0", codec="rounding", level="low"))
    assert [codec_of(store, key) for key in keys] == ["zstd"] * 2
    assert fetched(engine, keys) == [True] * 2


def test_wrong_orders_are_refused(make: Make) -> None:
    class Keeping(Scripted):
        capabilities = Capabilities(on_existing=OnExisting.KEEP)

    engine = make(Scripted(), layout=LAYOUT, codecs=holding(Toy(), Rounding()))
    with pytest.raises(ConfigError, match="no tier is named 'disk'"):
        engine.compress(tier="disk", codec="toy")
    with pytest.raises(ConfigError, match="no codec is named 'tow'"):
        engine.compress(tier="t0", codec="tow")
    with pytest.raises(ConfigError, match="no level 'best'"):
        engine.compress(tier="t0", codec="rounding", level="best")
    keeping = make(Keeping(), layout=LAYOUT, codecs=holding(Toy()))
    with pytest.raises(Unsupported, match="keeps the first value"):
        keeping.compress(tier="t0", codec="toy")
    read_only = msgspec.structs.replace(TIER, write="never")
    with pytest.raises(Unsupported, match="only read"):
        make(Scripted(), tier=read_only, layout=LAYOUT).decompress(tier="t0")


def test_content_is_what_the_tests_think() -> None:
    assert len(np.unique(content(0))) > 100
