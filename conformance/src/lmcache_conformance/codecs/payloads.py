"""Payloads that codecs are judged with: shapes as engines have them, and awkward contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_core.sdk import ELEMENT_BYTES, KVTensor, PayloadShape

Bytes = npt.NDArray[np.uint8]
_BITS: dict[str, npt.DTypeLike] = {
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float32": np.uint32,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One payload.

    Attributes:
        finite: it has neither NaN nor infinity.
    """

    name: str
    shape: PayloadShape
    payload: bytes
    finite: bool = True


def paged(
    dtype: str,
    *,
    layers: int,
    blocks: int,
    tokens: int,
    heads: int,
    head_size: int,
    transposed: bool,
) -> PayloadShape:
    """``[layers, blocks, heads, K | V]``: keys as [head_size, tokens] where ``transposed``, else
    K and V side by side for each token."""
    size = ELEMENT_BYTES[dtype]
    page = 2 * heads * tokens * head_size
    outer = (blocks * page, page)
    if transposed:
        head = 2 * tokens * head_size
        ways = (("key", 0, (1, head, tokens)), ("value", tokens * head_size, (head_size, head, 1)))
    else:
        row = (2 * head_size, 2 * head_size * tokens, 1)
        ways = (("key", 0, row), ("value", head_size, row))
    tensors = tuple(
        KVTensor(
            role=role,
            offset_bytes=start * size,
            shape=(layers, blocks, tokens, heads, head_size),
            strides_bytes=tuple(step * size for step in (*outer, *inner)),  # type: ignore[arg-type]
        )
        for role, start, inner in ways
    )
    return PayloadShape(nbytes=layers * blocks * page * size, dtype=dtype, tensors=tensors)


def shapes() -> Iterator[tuple[str, PayloadShape]]:
    """Every element type, both layouts, odd sizes and the smallest."""
    for dtype in ELEMENT_BYTES:
        yield (
            f"{dtype}, CPU pages",
            paged(dtype, layers=3, blocks=2, tokens=32, heads=2, head_size=32, transposed=True),
        )
        yield (
            f"{dtype}, GPU pages",
            paged(dtype, layers=2, blocks=4, tokens=16, heads=3, head_size=64, transposed=False),
        )
    yield (
        "odd sizes",
        paged("bfloat16", layers=1, blocks=3, tokens=7, heads=5, head_size=9, transposed=True),
    )
    yield (
        "one token",
        paged("bfloat16", layers=2, blocks=1, tokens=1, heads=1, head_size=8, transposed=False),
    )
    yield (
        "one element",
        paged("float32", layers=1, blocks=1, tokens=1, heads=1, head_size=1, transposed=True),
    )


def values_of(payload: bytes | memoryview, shape: PayloadShape, tensor: KVTensor) -> Any:
    """``tensor`` as float64 ``[layers, tokens, channels]``."""
    bits = np.frombuffer(payload, _BITS[shape.dtype])[tensor.offset_bytes // shape.element_bytes :]
    view = np.lib.stride_tricks.as_strided(bits, tensor.shape, tensor.strides_bytes)
    if shape.dtype == "bfloat16":
        found = (view.astype(np.uint32) << 16).view(np.float32)
    else:
        found = view.copy().view(np.float16 if shape.dtype == "float16" else np.float32)
    layers, blocks, tokens, heads, head_size = tensor.shape
    return found.astype(np.float64).reshape(layers, blocks * tokens, heads * head_size)


def error_of(before: bytes, after: bytes | memoryview, shape: PayloadShape) -> float:
    """As the contract measures it: the worst layer's root mean square of differences over that of
    the values; infinite where a layer of zeros does not come back as zeros."""
    worst = 0.0
    for tensor in shape.tensors:
        was, now = values_of(before, shape, tensor), values_of(after, shape, tensor)
        for layer in range(was.shape[0]):
            power = float(np.sqrt(np.mean(was[layer] ** 2)))
            lost = float(np.sqrt(np.mean((was[layer] - now[layer]) ** 2)))
            if not math.isfinite(lost):
                return math.inf
            worst = max(worst, lost / power if power else math.inf if lost else 0.0)
    return worst


def _pack(values: Any, shape: PayloadShape) -> bytes:
    """Floats in payload order as elements; bfloat16 by truncation."""
    if shape.dtype == "bfloat16":
        return bytes((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    with np.errstate(over="ignore"):
        kind = np.float16 if shape.dtype == "float16" else np.float32
        return bytes(values.astype(kind).tobytes())


def kv_like(shape: PayloadShape, rng: np.random.Generator) -> bytes:
    """Channels of their own scale and mean, that change slowly from token to token."""
    count = shape.nbytes // shape.element_bytes
    flat = np.zeros(count, np.float64)
    for tensor in shape.tensors:
        layers, blocks, tokens, heads, head_size = tensor.shape
        size = (layers, blocks * tokens, heads, head_size)
        scale = np.exp(rng.normal(0, 1.2, (layers, 1, heads, head_size)))
        steps = rng.normal(0, 1, size) + 2 * rng.normal(0, 1, (layers, 1, heads, head_size))
        for token in range(1, size[1]):
            steps[:, token] = 0.6 * steps[:, token - 1] + 0.8 * steps[:, token]
        start = tensor.offset_bytes // shape.element_bytes
        strides = tuple(stride // shape.element_bytes * 8 for stride in tensor.strides_bytes)
        view = np.lib.stride_tricks.as_strided(flat[start:], tensor.shape, strides)
        view[...] = (steps * scale).reshape(tensor.shape)
    return _pack(flat, shape)


def samples(rng: np.random.Generator) -> Iterator[Sample]:
    """Every shape with sensible contents, and one shape with every awkward content."""
    for name, shape in shapes():
        yield Sample(name, shape, kv_like(shape, rng))
    shape = paged("bfloat16", layers=2, blocks=2, tokens=32, heads=2, head_size=16, transposed=True)
    count = shape.nbytes // 2

    def of(name: str, make: Callable[[], Any], finite: bool = True) -> Sample:
        return Sample(name, shape, _pack(np.asarray(make(), np.float64), shape), finite)

    spiky = rng.normal(0, 1, count)
    spiky[:: count // 5] = 3e4
    broken = rng.normal(0, 1, count)
    broken[count // 3] = np.nan
    endless = rng.normal(0, 1, count)
    endless[count // 2] = np.inf
    yield of("zeros", lambda: np.zeros(count))
    yield of("one constant", lambda: np.full(count, 1.5))
    yield of("a layer of zeros", lambda: np.repeat([0.0, 1.0], count // 2) * rng.normal(size=count))
    yield of("outliers", lambda: spiky)
    yield of("denormals", lambda: rng.normal(0, 1e-39, count))
    yield of("large values", lambda: rng.normal(0, 1e37, count))
    yield of("a NaN", lambda: broken, finite=False)
    yield of("an infinity", lambda: endless, finite=False)
    noise = rng.integers(0, 256, shape.nbytes, np.uint8).tobytes()
    yield Sample("random bits", shape, noise, finite=False)
    plain = PayloadShape(nbytes=5001)
    yield Sample("bytes", plain, bytes(rng.integers(0, 9, plain.nbytes, np.uint8)))
    odd = PayloadShape(nbytes=5001, dtype="bfloat16")
    yield Sample("bytes that are no whole elements", odd, bytes(rng.integers(0, 9, 5001, np.uint8)))
