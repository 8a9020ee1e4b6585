"""cachegen: within its bound in every layout, the same on every machine, safe with any bytes."""

from __future__ import annotations

import base64
import functools
import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import codec_data
import numpy as np
import pytest
from codec_data import LAYOUTS, NHD, TRANSPOSED, Sample, decode, encode, kv, survives
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.codecs.cachegen import CacheGen
from lmcache_core.sdk import (
    CannotDecode,
    CannotEncode,
    ContractViolation,
    KVTensor,
    PayloadShape,
)

numba = pytest.importorskip("numba")

DTYPES = ("bfloat16", "float16", "float32")
LEVELS = CacheGen.info.levels
SMALL = Sample(kv(layers=1, tokens=64, heads=1, size=4))


@pytest.fixture(scope="module")
def codec() -> CacheGen:
    codec = CacheGen()
    codec.prepare()
    return codec


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((CannotEncode, CannotDecode)) as caught:
        call()
    return caught.value.reason


# What comes back.


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.tuples(*(st.integers(1, most) for most in (3, 3, 40, 3, 21))),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 99),
    odd=st.booleans(),
)
def test_any_shape_and_layout_comes_back_with_the_error_that_was_said(
    codec: CacheGen, lengths: Any, layout: Any, dtype: str, level: str, seed: int, odd: bool
) -> None:
    layers, blocks, tokens, heads, size = lengths
    sample = Sample(kv(layers, blocks, tokens, heads, size, seed), dtype, layout)
    try:
        stream, done = encode(codec, sample.payload, sample.shape, level=level)
    except CannotEncode as error:
        assert error.reason in ("size", "bound")  # a few values
        return
    assert len(stream) == done.nbytes < sample.shape.nbytes
    error = sample.error(decode(codec, stream, sample.shape, odd=odd))
    assert error == pytest.approx(done.error, rel=1e-3, abs=1e-6)
    assert error <= codec.info.max_error[level]


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_like_chunk_shrinks_at_every_level(codec: CacheGen, level: str) -> None:
    sample = Sample(kv(layers=4, tokens=256, heads=4, size=64))
    _, done = encode(codec, sample.payload, sample.shape, level=level)
    least = dict(zip(LEVELS, (4.0, 5.0, 6.0)))[level]
    assert sample.shape.nbytes / done.nbytes > least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [TRANSPOSED, (1, 0, 3, 2, 4), (4, 3, 2, 1, 0)])
def test_the_stream_does_not_depend_on_the_layout(
    codec: CacheGen, layout: tuple[int, ...], dtype: str
) -> None:
    values = kv(layers=2, blocks=2, tokens=24, heads=3, size=10)
    here, there = Sample(values, dtype, NHD), Sample(values, dtype, layout)
    stream, _ = encode(codec, here.payload, here.shape)
    assert encode(codec, there.payload, there.shape)[0] == stream
    assert np.array_equal(
        here.back(decode(codec, stream, here.shape)),
        there.back(decode(codec, stream, there.shape)),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_elements_are_the_float32_ones_rounded_to_nearest_even(
    codec: CacheGen, dtype: str
) -> None:
    values = kv(tokens=64)
    if dtype == "float16":
        values[..., 0] *= 1e-6  # subnormal ones
    exact = Sample(codec_data.to_values(codec_data.to_bits(values, dtype), dtype), "float32")
    half = Sample(exact.values, dtype)
    streams = [encode(codec, sample.payload, sample.shape)[0] for sample in (exact, half)]
    wide = exact.back(decode(codec, streams[0], exact.shape))
    narrow = half.back(decode(codec, streams[1], half.shape))
    nearest = codec_data.to_values(codec_data.to_bits(wide, dtype), dtype)
    if dtype == "bfloat16":
        assert np.array_equal(narrow, nearest)
    else:  # a subnormal may be rounded twice
        assert np.abs(narrow - nearest).max() <= 2.0**-24


def test_zeros_and_constants(codec: CacheGen) -> None:
    values = kv(layers=3, tokens=64, heads=2, size=16)
    values[:, 0] = 0.0
    values[:, 1] = np.linspace(-3, 900, 16)
    values[:, 2, ..., 3] = 5.0
    sample = Sample(values)
    stream, _ = encode(codec, sample.payload, sample.shape)
    back, exact = sample.back(decode(codec, stream, sample.shape)), sample.back(sample.payload)
    assert np.array_equal(back[:, 0], exact[:, 0])
    assert np.allclose(back[:, 1], exact[:, 1], rtol=2.0**-7)
    assert np.abs(back[:, 2, ..., 3] - 5.0).max() < 0.2


def test_outliers_come_back(codec: CacheGen) -> None:
    values = kv(layers=1, tokens=64, heads=4, size=64)
    values[0, 0, 0, 7, 1, 5] = 4e4
    values[1, 0, 0, 63, 3, 63] = -4e4
    sample = Sample(values)
    stream, _ = encode(codec, sample.payload, sample.shape)
    back = sample.back(decode(codec, stream, sample.shape))
    assert back[0, 0, 0, 7, 1, 5] == pytest.approx(4e4, rel=0.01)
    assert back[1, 0, 0, 63, 3, 63] == pytest.approx(-4e4, rel=0.01)


def test_a_large_middle_does_not_hide_small_differences(codec: CacheGen) -> None:
    values = kv(layers=1, tokens=64, heads=2, size=16) + np.float32(200.0)
    sample = Sample(values, "float32")
    stream, _ = encode(codec, sample.payload, sample.shape)
    back = sample.back(decode(codec, stream, sample.shape))
    assert np.corrcoef(back.ravel(), values.ravel())[0, 1] > 0.98


def test_a_quiet_token_is_kept_finer_in_keys_and_values(codec: CacheGen) -> None:
    values = kv(layers=1, tokens=64, heads=2, size=32)
    values[1, 0, 0, 5] *= 0.1
    sample = Sample(values, "float32")
    stream, _ = encode(codec, sample.payload, sample.shape, level="high")
    wrong = np.abs(sample.back(decode(codec, stream, sample.shape)) - values).mean(axis=(4, 5))
    for role in (0, 1):
        assert wrong[role, 0, 0, 5] < 0.25 * np.median(wrong[role])


def test_tensors_of_one_layer_each_are_the_same_planes(codec: CacheGen) -> None:
    sample = Sample(kv(layers=3, tokens=64, heads=2, size=16))
    whole = sample.shape
    single = [
        KVTensor(
            role=tensor.role,
            offset_bytes=tensor.offset_bytes + layer * tensor.strides_bytes[0],
            shape=(1, *tensor.shape[1:]),
            strides_bytes=tensor.strides_bytes,
        )
        for tensor in whole.tensors
        for layer in range(3)
    ]
    by_layer = PayloadShape(nbytes=whole.nbytes, dtype=whole.dtype, tensors=tuple(single))
    stream, _ = encode(codec, sample.payload, whole)
    assert encode(codec, sample.payload, by_layer)[0] == stream
    assert decode(codec, stream, by_layer) == decode(codec, stream, whole)


def test_keys_alone_as_of_a_latent_attention(codec: CacheGen) -> None:
    sample = Sample(kv(layers=2, tokens=64, heads=1, size=72))
    tensor = sample.shape.tensors[0]
    half = PayloadShape(nbytes=sample.shape.nbytes // 2, dtype="bfloat16", tensors=(tensor,))
    payload = sample.payload[: half.nbytes]
    stream, done = encode(codec, payload, half)
    assert done.error < codec.info.max_error["low"]
    assert sample.error(decode(codec, stream, half) + sample.payload[half.nbytes :]) == (
        pytest.approx(done.error, rel=1e-3)
    )


def test_threads_share_a_codec(codec: CacheGen) -> None:
    samples = [Sample(kv(layers=2, tokens=64, heads=2, size=32, seed=i)) for i in range(4)]
    alone = [encode(codec, s.payload, s.shape)[0] for s in samples]
    together: dict[int, bytes] = {}

    def work(i: int) -> None:
        for _ in range(8):
            stream, _ = encode(codec, samples[i].payload, samples[i].shape)
            assert samples[i].error(decode(codec, stream, samples[i].shape)) < 0.16
            together[i] = stream

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together.get(i) for i in range(len(samples))] == alone


# What is refused.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0, 0, 0, 0, 0), (1, 1, 0, 31, 1, 7), (0, 1, 0, 3, 0, 2)])
def test_values_that_are_not_finite(
    codec: CacheGen, dtype: str, bad: float, where: tuple[int, ...]
) -> None:
    sample = Sample(kv(), dtype)
    values = sample.values.copy()
    values[where] = bad
    bad_one = Sample(values, dtype)
    assert refusal(lambda: encode(codec, bad_one.payload, bad_one.shape)) == "nonfinite"


@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-39])
def test_an_error_over_the_bound(codec: CacheGen, scale: float) -> None:
    values = (kv(tokens=64, size=32) * scale).astype(np.float32)  # below the finest step
    for sample in (Sample(values, "float32"), Sample(values, "bfloat16")):
        assert refusal(functools.partial(encode, codec, sample.payload, sample.shape)) == "bound"


def test_a_payload_without_axes_or_bytes(codec: CacheGen) -> None:
    plain = PayloadShape(nbytes=64, dtype="bfloat16")
    assert refusal(lambda: encode(codec, bytes(64), plain)) == "axes"
    assert refusal(lambda: encode(codec, b"", PayloadShape(nbytes=0))) == "size"
    assert refusal(lambda: decode(codec, bytes(64), plain)) == "stream"


def test_a_target_that_is_too_short(codec: CacheGen) -> None:
    sample = Sample(kv(tokens=64))
    stream, _ = encode(codec, sample.payload, sample.shape)
    assert encode(codec, sample.payload, sample.shape, room=len(stream))[0] == stream
    for room in (*range(0, len(stream), 97), len(stream) - 1):
        short = functools.partial(encode, codec, sample.payload, sample.shape, room=room)
        assert refusal(short) == "size"


def test_a_few_values_do_not_shrink(codec: CacheGen) -> None:
    sample = Sample(kv(layers=1, tokens=2, heads=1, size=2))
    assert refusal(lambda: encode(codec, sample.payload, sample.shape)) == "size"


def test_wrong_calls(codec: CacheGen) -> None:
    sample = SMALL
    with pytest.raises(ContractViolation):
        encode(codec, sample.payload, sample.shape, level="extreme")
    with pytest.raises(ContractViolation):
        encode(codec, sample.payload[:-2], sample.shape)


# What bytes can do.


@pytest.fixture(scope="module")
def small(codec: CacheGen) -> bytes:
    sample = Sample(kv(layers=1, tokens=64, heads=2, size=8))
    return encode(codec, sample.payload, sample.shape)[0]


SHAPE = Sample(kv(layers=1, tokens=64, heads=2, size=8)).shape


def test_a_stream_that_is_cut_or_longer_is_refused(codec: CacheGen, small: bytes) -> None:
    for length in range(len(small)):
        assert survives(codec, small[:length], SHAPE), length
    assert survives(codec, small + b"\0", SHAPE)


def test_flipped_bits_do_no_harm(codec: CacheGen, small: bytes) -> None:
    refused = 0
    for bit in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        refused += survives(codec, bytes(damaged), SHAPE)
    assert refused > 4 * len(small)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_random_bytes_do_no_harm(codec: CacheGen, small: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 200))
    noise = data.draw(st.binary(max_size=400))
    assert survives(codec, noise, SHAPE)
    survives(codec, small[:start] + noise + small[start + len(noise) :], SHAPE)


def test_a_stream_of_another_shape_type_or_version(codec: CacheGen, small: bytes) -> None:
    other = Sample(kv(layers=2, tokens=32, heads=2, size=8))
    assert refusal(lambda: decode(codec, small, other.shape)) == "stream"
    half = PayloadShape(nbytes=SHAPE.nbytes, dtype="float16", tensors=SHAPE.tensors)
    assert refusal(lambda: decode(codec, small, half)) == "stream"
    newer = small[:4] + (codec.info.version + 1).to_bytes(2, "little") + small[6:]
    assert refusal(lambda: decode(codec, newer, SHAPE)) == "version"
    assert refusal(lambda: decode(codec, b"", SHAPE)) == "stream"


GOLDEN = (
    "Oie>a0RR9100IC2000001ONa400000paB2?-v9sr00000A^-pYQ~&?~l>h($-v9sr0RRC20RRC20RRC20RRC20RRC20R"
    "RC20RRC20RRC20RRC2fPsw7gEN1DgHMYIfvA3hfTV*nhpvOyfTVtcS%ij#>4e`|eu9A)gk6Oggt~ybeuIJHgm{GVgG+%"
    "eJbi>cf+mAlf@6gQfvkY_J$!_K^?<j9yMZ!-CW4@WGJ!HZe1(C%f);}#f^UKrfxUrbfU;RxdWTn6SAn#FU4dPKxPe`Pw"
    "1KpMu7R{yS9*qmsDR{w#{hxHf~$b!fyV%V<bdRW<bdROhk*b9fdBx30D%C3004mifdGL3fdGO4f&hX5fdGAmftmn;nt_"
    "^unt_^wFoBwZnt_^iih;+0#{h$mgN^_I0D;E<0000000000004o<fyV&=0RRC20RRC20RRC20RRC20RRC20RRC20RRC2"
    "0RRC20RRC20RRC2d4Gri000000Ehq*8-f6W004pjf&hd7f&c&jf&c;pf&hd7iU0r<f&hd7f&c&jf&hX5004pj0000000"
    "000004pj0058x0058x00e}9f`Eizf?$F`0C<1^Ga?`W02rqNU$7tm0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4"
    "h0Du4h0Du4h0Du4h0Du4h0A2tx0Du4h9f$w`0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0"
    "Du4h0Du4h0Du4h1oXuWI1dbj5(*rw30}vPT*<Hya}L&7p{*%Zh|*SvmVe;n1U^$B#_<6FidFXjssaK40Du4h0Du4h0Du"
    "4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h0Du4h+}CJT(2&MPJu{~g*Q&o9oLBpA@kF_x6(%;?dwCpra1dV;"
    "P*ox)Rpd?x^XEum$k7tvZrn?nK&B?Vr}vvk>(wQD1ONhnJPs@x0RSXBc>n-_0001h0001h0001h0001h0001h0001h00"
    "01h0001h0001h0001h0001h008IY5G5|VVG=kBaQz1A)|1rZe7-<UAEr0xHZ1P9EyCx;J>@>RUF$X|_CAv3XdG}K<vVG"
    "D0J<lJ-*VpQb_e_*8+cHjQFIV;CPB$}>$Gvv*oF"
)
GOLDEN_SHA256 = "77725d3f5f6f475f904c26f5b4406592f7971221bec877980d7acc232e0a335f"


def test_a_stream_of_version_1_is_the_same_values_for_ever(codec: CacheGen) -> None:
    stream = base64.b85decode(GOLDEN)
    payload = decode(codec, stream, SMALL.shape)
    assert hashlib.sha256(payload).hexdigest() == GOLDEN_SHA256
    assert SMALL.error(payload) < codec.info.max_error["low"]


@settings(max_examples=50, deadline=None)
@given(
    tables=st.integers(1, 5),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 40),
    wide=st.integers(0, 255),
    seed=st.integers(0, 999),
)
def test_the_coder_gives_any_symbols_back(
    codec: CacheGen, tables: int, tokens: int, channels: int, wide: int, seed: int
) -> None:
    from lmcache_core.codecs import rans

    random = np.random.default_rng(seed)
    symbols = (random.random((2, tokens, channels)) ** 3 * (wide + 1)).astype(np.uint8)
    classes = random.integers(0, tables, (2, channels), np.uint8)
    moves = random.integers(0, 3, (2, tokens), np.uint8)
    histogram = np.zeros((tables + 2, 256), np.int64)
    np.add.at(histogram, (classes[:, None, :] + moves[:, :, None], symbols), 1)
    table = np.zeros(histogram.shape, np.uint16)
    rans.frequencies(histogram, table)
    assert set(table.sum(axis=1)) <= {0, rans.TOTAL}
    assert np.array_equal(table > 0, histogram > 0)
    factor, entry = np.empty(table.size, np.uint64), np.empty(table.size, np.uint32)
    rans.encoder_tables(table, factor, entry)
    words, starts = np.zeros(symbols.size + 200, np.uint16), np.zeros(3, np.int64)
    end = len(words) - rans.LANES
    rans.encode(symbols, classes, moves, factor, entry, words, end, starts[:2])
    starts[2] = end
    slots, back = np.empty(len(table) * rans.TOTAL, np.uint32), np.empty_like(symbols)
    rans.decoder_tables(table, slots)
    assert rans.decode(words, starts, classes, moves, slots, back) == 0
    assert np.array_equal(back, symbols)


# What it needs.


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_a_codec_imports_no_numba() -> None:
    code = "import sys, lmcache_core.codecs.cachegen, lmcache_core.codecs.zstd\n"
    assert run(code + "print({'numba', 'llvmlite', 'zstandard'} & set(sys.modules))") == "set()\n"


def test_without_numba_the_error_names_the_command() -> None:
    code = (
        "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
        "from lmcache_core.codecs.cachegen import CacheGen\n"
        "from lmcache_core.sdk import ConfigError\n"
        "try: CacheGen().prepare()\n"
        "except ConfigError as error: print(error.hint)\n"
    )
    assert run(code) == "pip install 'lmcache-core[cachegen]'\n"


def test_llvmlite_does_not_stand_in_the_way_of_vars(codec: CacheGen) -> None:
    import llvmlite.binding.ffi

    assert vars(llvmlite.binding.ffi.lib).get("kernel") is None


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_core.codecs import jit

    real = numba.njit

    def njit(*args: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available for file")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert jit.compiled("i8(i8)")(lambda value: value + 1)(41) == 42
