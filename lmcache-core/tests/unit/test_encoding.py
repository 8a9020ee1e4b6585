"""Chunks that lie encoded on a tier: chosen by configuration, read by what the envelope says."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
from scripted import CHUNK, TIER, Make, Scripted, make, prompt, until
from toy_codecs import Lossless, Rounding, Toy, holding

from lmcache_core import envelope
from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import TierConfig, from_mapping
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import HEADER_BYTES, stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.sdk import ConfigError, ContractViolation, KVTensor, OpContext, PayloadShape
from lmcache_core.tiers.encoding import Encoding

__all__ = ["make"]

PAYLOAD_BYTES = 40_000
LAYOUT = ChunkLayout(chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"encoded")
CODED = msgspec.structs.replace(TIER, codec="toy", deadline_s=1.0)


def content(index: int) -> np.ndarray:
    """Bytes that zlib shrinks."""
    rows = np.arange(PAYLOAD_BYTES, dtype=np.uint32) // 64
    return (rows * (index + 3)).astype(np.uint8)


def store_chunks(engine: CacheEngine, seed: int, count: int) -> list[bytes]:
    """Store and flush ``count`` chunks; their keys."""
    tokens = prompt(seed, count)
    keys = engine.keys(tokens)
    chunks = []
    for index, key in enumerate(keys):
        chunk = engine.reserve_key(key, keys[index - 1] if index else None, layout=LAYOUT)
        assert chunk is not None
        engine.host.payload(chunk)[:] = content(index)
        chunks.append(chunk)
    engine.commit(chunks)
    assert engine.flush(5.0)
    return keys


def fetched(engine: CacheEngine, keys: list[bytes]) -> list[bool]:
    """Whether each chunk comes back from below host with the right bytes; drops host first."""
    engine.host.drop(keys)
    ticket = engine.prefetch_keys(keys, layout=LAYOUT, deadline_s=engine.now_s() + 3.0)
    until(engine, lambda: ticket.done, limit_s=4.0)
    hits = [np.array_equal(engine.host.payload(c), content(i)) for i, c in enumerate(ticket.hits())]
    engine.release(ticket)
    return hits


def counter(engine: CacheEngine, name: str) -> int:
    return engine.metrics.snapshot().get(name, 0)


def test_what_is_stored_is_smaller_and_comes_back_whole(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 3)
    for key in keys:
        header = envelope.read_header(memoryview(store._values[key]))
        assert isinstance(header, envelope.Header)
        assert (header.codec, header.raw_bytes) == ("toy", PAYLOAD_BYTES)
        assert len(store._values[key]) < stored_bytes(PAYLOAD_BYTES) // 2
    assert fetched(engine, keys) == [True] * 3
    assert counter(engine, "t0.decoded.toy") == 3


def test_the_quota_counts_what_is_stored(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 3)
    assert engine.tiers.readable[0].used_bytes == sum(len(store._values[key]) for key in keys)


def test_a_bounded_tier_holds_more_chunks_for_being_encoded(make: Make) -> None:
    store = Scripted()
    tier = msgspec.structs.replace(CODED, size_bytes=2 * stored_bytes(PAYLOAD_BYTES))
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 4)
    assert len(store._values) == 4
    assert store.peak_bytes <= tier.size_bytes
    assert fetched(engine, keys) == [True] * 4


def test_a_reader_needs_no_configuration(make: Make) -> None:
    store = Scripted()
    codecs = holding(Toy())
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=codecs), 1, 2)
    reader = make(store, layout=LAYOUT, codecs=codecs)
    assert fetched(reader, keys) == [True] * 2


def test_what_was_decoded_can_be_stored_as_it_is_elsewhere(make: Make) -> None:
    store, codecs = Scripted(), holding(Toy())
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=codecs), 1, 2)
    engine = make(store, layout=LAYOUT, codecs=codecs)
    ticket = engine.prefetch_keys(keys, layout=LAYOUT, deadline_s=engine.now_s() + 3)
    until(engine, lambda: ticket.done)
    assert [chunk.framed for chunk in ticket.hits()] == [False, False]
    engine.release(ticket)


def test_an_unknown_codec_is_a_miss_with_a_reason_and_stays(make: Make) -> None:
    store = Scripted()
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy())), 1, 1)
    reader = make(store, layout=LAYOUT, codecs=holding(Lossless()))
    ticket = reader.prefetch_keys(keys, layout=LAYOUT, deadline_s=reader.now_s() + 3)
    until(reader, lambda: ticket.done)
    assert not ticket.hits()
    assert reader.why_missed(ticket, 0) == "codec"
    assert counter(reader, "t0.codec_unknown.toy") == 1
    reader.release(ticket)
    reader.flush(1.0)
    assert keys[0] in store._values
    assert reader.tiers.readable[0].available


def test_what_could_not_be_read_is_stored_anew(make: Make) -> None:
    store = Scripted()
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy())), 1, 1)
    engine = make(store, layout=LAYOUT, codecs=holding())
    engine.tiers.readable[0].recover()
    assert fetched(engine, keys) == []
    assert store_chunks(engine, 1, 1) == keys
    assert fetched(engine, keys) == [True]


def test_a_stream_of_another_version_is_a_miss_and_stays(make: Make) -> None:
    store, newer = Scripted(), Toy()
    newer.writes = b"2"
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=holding(newer)), 1, 1)
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    assert fetched(engine, keys) == []
    assert counter(engine, "t0.codec_version.toy") == 1
    assert keys[0] in store._values


def test_a_stream_that_the_codec_refuses_is_corrupt(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 1)
    value = bytearray(stored_bytes(100))
    value[HEADER_BYTES : HEADER_BYTES + 100] = b"1" + bytes(99)
    envelope.seal(
        memoryview(value),
        key=keys[0],
        layout=LAYOUT.encoded_fingerprint,
        payload_bytes=100,
        codec="toy",
        raw_bytes=PAYLOAD_BYTES,
    )
    store._values[keys[0]] = bytes(value)
    assert fetched(engine, keys) == []
    assert counter(engine, "t0.corrupt.codec_stream") == 1
    engine.flush(1.0)
    until(engine, lambda: keys[0] not in store._values)


@pytest.mark.parametrize("raises", [ValueError("broken"), MemoryError()])
def test_a_decoder_that_fails_is_a_miss(make: Make, raises: Exception) -> None:
    store, codec = Scripted(), Toy()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(codec))
    keys = store_chunks(engine, 1, 1)
    codec.raises = raises
    assert fetched(engine, keys) == []
    assert counter(engine, "t0.codec_failed.toy") == 1
    assert engine.tiers.readable[0].available
    engine.flush(1.0)
    assert keys[0] in store._values, "an error that nobody has classified deletes nothing"


def test_a_failure_of_our_own_after_a_read_is_a_miss_and_nothing_hangs(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Encoding, "open", lambda *args, **rest: 1 / 0)
        assert fetched(engine, keys) == []
    assert counter(engine, "t0.finish_failed.get") == 1
    assert engine.tiers.readable[0].available
    assert fetched(engine, keys) == [True]


@pytest.mark.parametrize("position", [5000, HEADER_BYTES + 1, 100, 60])
def test_a_flipped_bit_is_corrupt(make: Make, position: int) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    keys = store_chunks(engine, 1, 1)
    value = bytearray(store._values[keys[0]])
    value[min(position, len(value) - 1)] ^= 1
    if position == 5000:
        value[HEADER_BYTES + 7] ^= 1
    store._values[keys[0]] = bytes(value)
    assert fetched(engine, keys) == []
    assert counter(engine, "t0.corrupt") == 1


@pytest.mark.parametrize("reason", ["axes", "bound", "nonfinite", "size"])
def test_what_a_lossy_codec_refuses_is_stored_lossless(make: Make, reason: str) -> None:
    store, lossy = Scripted(), Rounding()
    lossy.refuses = reason
    tier = msgspec.structs.replace(CODED, codec="rounding")
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(lossy, Lossless()))
    keys = store_chunks(engine, 1, 2)
    header = envelope.read_header(memoryview(store._values[keys[0]]))
    assert isinstance(header, envelope.Header)
    assert header.codec == "zstd"
    assert fetched(engine, keys) == [True] * 2
    assert counter(engine, f"t0.codec_refused.{reason}.rounding") == 2


def test_what_no_codec_takes_is_stored_as_it_is(make: Make) -> None:
    store, codec = Scripted(), Toy()
    codec.raises = ValueError("broken")
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(codec))
    keys = store_chunks(engine, 1, 2)
    assert fetched(engine, keys) == [True] * 2
    assert counter(engine, "t0.encoded.as_is") == 2


def test_a_codec_over_its_own_bound_is_not_believed(make: Make) -> None:
    store, lossy = Scripted(), Rounding()
    lossy.error = 0.15
    tier = msgspec.structs.replace(CODED, codec="rounding")
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(lossy))
    keys = store_chunks(engine, 1, 1)
    assert counter(engine, "t0.codec_refused.bound.rounding") == 1
    assert fetched(engine, keys) == [True]
    lossy.error = float("nan")
    store_chunks(engine, 2, 1)
    assert counter(engine, "t0.codec_refused.bound.rounding") == 2


def test_the_level_is_handed_on(make: Make) -> None:
    store, lossy = Scripted(), Rounding()
    tier = msgspec.structs.replace(CODED, codec="rounding", codec_level="high")
    store_chunks(make(store, tier=tier, layout=LAYOUT, codecs=holding(lossy)), 1, 1)
    assert lossy.levels == ["high"]


def test_a_codec_that_is_not_ready_costs_a_load_its_deadline_only(make: Make) -> None:
    store = Scripted()
    keys = store_chunks(make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy())), 1, 1)
    slow = Toy()
    slow.prepared.clear()
    tier = msgspec.structs.replace(TIER, deadline_s=0.3)
    reader = make(store, tier=tier, layout=LAYOUT, codecs=holding(slow))
    assert fetched(reader, keys) == []
    assert reader.tiers.readable[0].available, "the store is not to blame"
    slow.prepared.set()
    time.sleep(0.05)
    assert fetched(reader, keys) == [True]


def test_staging_memory_is_bounded_and_comes_back(make: Make) -> None:
    store = Scripted()
    tier = msgspec.structs.replace(CODED, max_staging_bytes=2 * stored_bytes(PAYLOAD_BYTES))
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(Toy()), host_chunks=12)
    before = engine.host.used_bytes
    keys = store_chunks(engine, 1, 8)
    assert len(store._values) == 8
    engine.host.drop(keys)
    assert engine.host.used_bytes == before


def test_an_abandoned_put_loses_the_staging_slot_and_not_the_chunk(make: Make) -> None:
    store = Scripted()
    engine = make(store, tier=CODED, layout=LAYOUT, codecs=holding(Toy()))
    store.abandon = []
    tokens = prompt(1, 1)
    key = engine.keys(tokens)[0]
    chunk = engine.reserve_key(key, None, layout=LAYOUT)
    assert chunk is not None
    engine.host.payload(chunk)[:] = content(0)
    engine.commit([chunk])
    engine.flush(2.0)
    assert engine.host.lost_bytes == stored_bytes(PAYLOAD_BYTES)
    assert chunk.pins == 0
    for buffer in store.abandon:
        engine.released(buffer.token)
    engine.poll()
    assert engine.host.lost_bytes == 0


def test_a_store_that_dies_ends_what_waits_for_staging(make: Make) -> None:
    store = Scripted()
    tier = msgspec.structs.replace(
        CODED, max_staging_bytes=1, deadline_s=0.2, failures_to_open=1, threads=1
    )
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(Toy()), host_chunks=12)
    store.raises = OSError("gone")
    keys = store_chunks(engine, 1, 6)
    assert engine.unsettled == 0
    assert engine.unstored == len(keys)


def test_a_wrong_codec_or_level_is_an_error_at_the_start() -> None:
    with pytest.raises(ConfigError, match="no codec is named 'zstandard'") as caught:
        Encoding(TierConfig(url="x://", codec="zstandard"), holding(Lossless()))
    assert "zstd" in caught.value.hint
    with pytest.raises(ConfigError, match="no level 'best'") as caught:
        Encoding(TierConfig(url="x://", codec="rounding", codec_level="best"), holding(Rounding()))
    assert "low, high" in caught.value.hint
    with pytest.raises(ConfigError, match="without a codec"):
        from_mapping({"tiers": [{"url": "x://", "codec_level": "high"}]})
    with pytest.raises(ConfigError, match="codec_level: auto"):
        from_mapping({"tiers": [{"url": "x://", "codec": "zstd", "ttft_target_s": 1}]})


def test_a_broken_codec_names_its_fix() -> None:
    class Nameless(Toy):
        pass

    for made, why in (
        (("other", Nameless), "calls itself 'toy'"),
        (("toy", dict), "not a Codec"),
        (("toy", lambda: 1 / 0), "division by zero"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            holding(made).get(made[0])
        assert "pip install -U" in caught.value.hint


def test_the_codecs_of_core_are_installed() -> None:
    assert {"cachegen", "zstd"} <= set(Codecs().names())


def test_auto_keeps_chunks_as_they_are_on_a_fast_link(make: Make) -> None:
    store, lossy = Scripted(), Rounding()
    tier = msgspec.structs.replace(CODED, codec="rounding", codec_level="auto")
    engine = make(store, tier=tier, layout=LAYOUT, codecs=holding(lossy), host_chunks=80)
    store_chunks(engine, 1, 40)
    raw_first = counter(engine, "t0.chosen.as_is")
    assert raw_first >= 26, "a link of unknown speed: nothing is encoded for the first MiB"
    engine.flush(1.0)
    store_chunks(engine, 2, 10)
    tried = counter(engine, "t0.chosen.rounding-low"), counter(engine, "t0.chosen.rounding-high")
    assert tried == (1, 1)
    assert counter(engine, "t0.chosen.as_is") == 48


def test_a_stale_target_is_not_touched_by_what_is_longer_than_the_slot(make: Make) -> None:
    """A value that says it is larger than the chunk is corrupt, whatever it decodes to."""
    store = Scripted()
    engine = make(store, layout=LAYOUT, codecs=holding(Toy()))
    keys = engine.keys(prompt(1, 1))
    value = bytearray(stored_bytes(PAYLOAD_BYTES))
    envelope.seal(
        memoryview(value),
        key=keys[0],
        layout=LAYOUT.encoded_fingerprint,
        payload_bytes=1000,
        codec="toy",
        raw_bytes=2 * PAYLOAD_BYTES,
    )
    store.put_value = bytes(value[: stored_bytes(1000)])
    store._values[keys[0]] = store.put_value
    assert fetched(engine, keys) == []
    assert counter(engine, "t0.corrupt.length") == 1


TENSOR = KVTensor(
    role="key", offset_bytes=0, shape=(1, 1, 4, 2, 2), strides_bytes=(32, 32, 8, 4, 2)
)


def test_a_shape_is_exact() -> None:
    shape = PayloadShape(nbytes=32, dtype="bfloat16", tensors=(TENSOR,))
    assert shape.element_bytes == 2
    for wrong in (
        {"offset_bytes": 2},
        {"offset_bytes": -2},
        {"offset_bytes": 1},
        {"role": "query"},
        {"shape": (1, 1, 4, 2, 0)},
        {"shape": (1, 1, 4, 2, 3)},
        {"strides_bytes": (32, 32, 8, 4, 1)},
        {"strides_bytes": (32, 32, 8, 2, 2)},
        {"strides_bytes": (32, 32, 4, 4, 2)},
        {"strides_bytes": (32, 32, 0, 4, 2)},
    ):
        values = {name: getattr(TENSOR, name) for name in TENSOR.__slots__} | wrong
        with pytest.raises(ContractViolation):
            PayloadShape(nbytes=32, dtype="bfloat16", tensors=(KVTensor(**values),))
    for nbytes, dtype in ((30, "bfloat16"), (34, "bfloat16"), (32, "int8"), (32, "")):
        with pytest.raises(ContractViolation):
            PayloadShape(nbytes=nbytes, dtype=dtype, tensors=(TENSOR,))


def test_a_chunk_of_another_shape_is_not_decoded(make: Make) -> None:
    shape = PayloadShape(nbytes=PAYLOAD_BYTES, dtype="bfloat16")
    other = ChunkLayout(
        chunk_size=CHUNK, payload_bytes=PAYLOAD_BYTES, description=b"encoded", shape=shape
    )
    assert other.fingerprint == LAYOUT.fingerprint
    assert other.encoded_fingerprint != LAYOUT.encoded_fingerprint


def soon() -> OpContext:
    return OpContext(deadline_s=time.monotonic() + 1)
