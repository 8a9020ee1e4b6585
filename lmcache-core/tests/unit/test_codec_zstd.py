"""zstd: bit for bit, smaller for keys and values, safe with any bytes."""

from __future__ import annotations

import functools
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from codec_data import Sample, decode, encode, kv, survives
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.codecs import zstd
from lmcache_core.codecs.zstd import Zstd
from lmcache_core.sdk import CannotDecode, CannotEncode, ContractViolation, PayloadShape

zstandard = pytest.importorskip("zstandard")

DTYPES = ("", "bfloat16", "float16", "float32")
SHAPE = PayloadShape(nbytes=1024, dtype="bfloat16")


@pytest.fixture(scope="module")
def codec() -> Zstd:
    codec = Zstd()
    codec.prepare()
    return codec


@pytest.fixture(scope="module")
def small(codec: Zstd) -> bytes:
    return encode(codec, Sample(kv(layers=1, tokens=64, heads=1, size=4)).payload, SHAPE)[0]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((CannotEncode, CannotDecode)) as caught:
        call()
    return caught.value.reason


@settings(max_examples=100, deadline=None)
@given(
    unit=st.binary(min_size=1, max_size=60),
    times=st.integers(20, 200),
    extra=st.binary(max_size=5),
    dtype=st.sampled_from(DTYPES),
    odd=st.booleans(),
)
def test_any_bytes_come_back(
    codec: Zstd, unit: bytes, times: int, extra: bytes, dtype: str, odd: bool
) -> None:
    payload = unit * times + extra
    shape = PayloadShape(nbytes=len(payload), dtype=dtype)
    try:
        stream, done = encode(codec, payload, shape)
    except CannotEncode as error:
        assert error.reason == "size"
        return
    assert len(stream) < len(payload) and done.error == 0.0
    assert decode(codec, stream, shape, odd=odd) == payload


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_pattern_of_bits_comes_back(codec: Zstd, dtype: str) -> None:
    payload = np.arange(1 << 16, dtype=np.uint16).tobytes() * 2
    shape = PayloadShape(nbytes=len(payload), dtype=dtype)
    assert decode(codec, encode(codec, payload, shape)[0], shape) == payload


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_several_blocks_come_back(codec: Zstd, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstd, "_BLOCK", 1000)
    sample = Sample(kv(layers=2, tokens=64, heads=2, size=16), dtype)
    stream, _ = encode(codec, sample.payload, sample.shape)
    assert decode(codec, stream, sample.shape) == sample.payload


@pytest.mark.parametrize(
    ("dtype", "least"), [("bfloat16", 1.4), ("float16", 1.1), ("float32", 1.1)]
)
def test_keys_and_values_shrink(codec: Zstd, dtype: str, least: float) -> None:
    sample = Sample(kv(layers=4, tokens=256, heads=2, size=64), dtype)
    _, done = encode(codec, sample.payload, sample.shape)
    assert sample.shape.nbytes / done.nbytes > least


def test_bytes_that_do_not_shrink_or_are_none(codec: Zstd) -> None:
    noise = np.random.default_rng(0).bytes(1 << 16)
    for dtype in DTYPES:
        shape = PayloadShape(nbytes=len(noise), dtype=dtype)
        assert refusal(functools.partial(encode, codec, noise, shape)) == "size"
    assert refusal(lambda: encode(codec, b"", PayloadShape(nbytes=0))) == "size"


def test_a_target_that_is_too_short(codec: Zstd, small: bytes) -> None:
    payload = decode(codec, small, SHAPE)
    assert encode(codec, payload, SHAPE, room=len(small))[0] == small
    for room in range(len(small)):
        assert refusal(functools.partial(encode, codec, payload, SHAPE, room=room)) == "size"


def test_wrong_calls(codec: Zstd) -> None:
    with pytest.raises(ContractViolation):
        encode(codec, bytes(1024), SHAPE, level="extreme")
    with pytest.raises(ContractViolation):
        encode(codec, bytes(1022), SHAPE)


def test_threads_share_a_codec(codec: Zstd) -> None:
    samples = [Sample(kv(tokens=256, seed=i)) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            stream, _ = encode(codec, samples[i].payload, samples[i].shape)
            if decode(codec, stream, samples[i].shape) != samples[i].payload:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_that_is_cut_or_longer_is_refused(codec: Zstd, small: bytes) -> None:
    for length in range(len(small)):
        assert survives(codec, small[:length], SHAPE), length
    assert survives(codec, small + b"\0", SHAPE)


def test_flipped_bits_do_no_harm(codec: Zstd, small: bytes) -> None:
    for bit in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        survives(codec, bytes(damaged), SHAPE)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_bytes_do_no_harm(codec: Zstd, small: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 200))
    noise = data.draw(st.binary(max_size=400))
    assert survives(codec, noise, SHAPE)
    survives(codec, small[:start] + noise + small[start + len(noise) :], SHAPE)


def test_a_frame_that_claims_much_memory_is_refused_before_it_is_taken(codec: Zstd) -> None:
    head = struct.pack("<4sHBBQ", b"LMCZ", 1, 2, 0, SHAPE.nbytes)
    frame = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + (1 << 40).to_bytes(8, "little") + bytes(16)
    assert zstandard.frame_content_size(frame) == 1 << 40
    stream = head + struct.pack("<I", len(frame)) + frame
    assert refusal(lambda: decode(codec, stream, SHAPE)) == "stream"


def test_a_stream_of_another_shape_type_or_version(codec: Zstd, small: bytes) -> None:
    for other in (
        PayloadShape(nbytes=1026, dtype="bfloat16"),
        PayloadShape(nbytes=1024),
        PayloadShape(nbytes=0),
    ):
        assert refusal(functools.partial(decode, codec, small, other)) == "stream"
    newer = small[:4] + (codec.info.version + 1).to_bytes(2, "little") + small[6:]
    assert refusal(lambda: decode(codec, newer, SHAPE)) == "version"
    assert refusal(lambda: decode(codec, b"", SHAPE)) == "stream"


def test_without_zstandard_the_error_names_the_command() -> None:
    code = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from lmcache_core.codecs.zstd import Zstd\n"
        "from lmcache_core.sdk import ConfigError\n"
        "try: Zstd().prepare()\n"
        "except ConfigError as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "pip install 'lmcache-core[zstd]'\n", done.stderr
