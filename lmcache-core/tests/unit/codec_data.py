"""Payloads for tests of codecs: keys and values in any layout of memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmcache_core.sdk import CannotDecode, Codec, Encoded, KVTensor, PayloadShape

AXES = ("layer", "block", "token", "head", "index")
LAYOUTS = tuple(itertools.permutations(range(5)))
NHD, TRANSPOSED = (0, 1, 2, 3, 4), (0, 1, 3, 4, 2)
"""Orders of axes in memory, slowest first: tokens of all heads; tokens of each channel."""
_GUARD = 64
_PATTERN = 0xA5


def to_bits(values: NDArray[np.float32], dtype: str) -> NDArray[np.unsignedinteger]:
    """Elements nearest to values, ties to even."""
    if dtype == "float32":
        return values.astype(np.float32).view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
        np.uint16
    )


def to_values(bits: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.float32]:
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True)
class Sample:
    """Keys and values ``[2, layers, blocks, tokens, heads, size]`` as one payload."""

    values: NDArray[np.float32]
    dtype: str = "bfloat16"
    layout: tuple[int, ...] = NHD

    @property
    def shape(self) -> PayloadShape:
        size = 4 if self.dtype == "float32" else 2
        lengths = self.values.shape[1:]
        strides, step = [0] * 5, size
        for axis in reversed(self.layout):
            strides[axis], step = step, step * lengths[axis]
        tensors = tuple(
            KVTensor(role=role, offset_bytes=i * step, shape=lengths, strides_bytes=tuple(strides))
            for i, role in enumerate(("key", "value"))
        )
        return PayloadShape(nbytes=2 * step, dtype=self.dtype, tensors=tensors)

    @property
    def payload(self) -> bytes:
        order = (0, *(axis + 1 for axis in self.layout))
        return to_bits(np.ascontiguousarray(self.values.transpose(order)), self.dtype).tobytes()

    def back(self, payload: bytes) -> NDArray[np.float32]:
        """Values of a payload of this shape, in the order of `values`."""
        order = (0, *(axis + 1 for axis in self.layout))
        bits = np.frombuffer(payload, np.uint32 if self.dtype == "float32" else np.uint16)
        stored = to_values(bits, self.dtype).reshape([self.values.shape[axis] for axis in order])
        return stored.transpose(np.argsort(order))

    def error(self, payload: bytes) -> float:
        """As `Codec.encode_into` defines it."""
        exact, found = (self.back(data).astype(np.float64) for data in (self.payload, payload))
        lost = np.square(exact - found).sum(axis=(2, 3, 4, 5))
        power = np.square(exact).sum(axis=(2, 3, 4, 5))
        return float(np.sqrt(np.divide(lost, power, out=np.zeros_like(lost), where=lost > 0)).max())


def kv(layers: int = 2, blocks: int = 1, tokens: int = 32, heads: int = 2, size: int = 8,
       seed: int = 0) -> NDArray[np.float32]:  # fmt: skip
    """Values that are like a model's: channels of their own middle and scale, tokens alike."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((2, layers, blocks * tokens, heads, size), dtype=np.float32)
    for token in range(1, blocks * tokens):
        noise[:, :, token] = 0.5 * noise[:, :, token - 1] + 0.87 * noise[:, :, token]
    scale = np.exp(0.7 * random.standard_normal((2, layers, 1, heads, size)))
    middle = random.standard_normal((2, layers, 1, heads, size))
    values = (noise * scale + middle).astype(np.float32)
    return values.reshape(2, layers, blocks, tokens, heads, size)


def encode(codec: Codec, payload: bytes, shape: PayloadShape, *, level: str = "",
           room: int | None = None) -> tuple[bytes, Encoded]:  # fmt: skip
    """The stream; what is behind the target must stay as it is."""
    room = len(payload) + 4096 if room is None else room
    memory = bytearray([_PATTERN]) * (room + _GUARD)
    try:
        done = codec.encode_into(
            memoryview(payload), memoryview(memory)[:room], shape=shape, level=level
        )
    finally:
        assert memory[room:] == bytes([_PATTERN]) * _GUARD
    return bytes(memory[: done.nbytes]), done


def decode(codec: Codec, stream: bytes, shape: PayloadShape, *, odd: bool = False) -> bytes:
    """The payload; what is around the target must stay as it is."""
    before = _GUARD + odd
    memory = bytearray([_PATTERN]) * (before + shape.nbytes + _GUARD)
    target = memoryview(memory)[before : before + shape.nbytes]
    try:
        codec.decode_into(memoryview(stream), target, shape=shape)
    finally:
        assert memory[:before] == bytes([_PATTERN]) * before
        assert memory[before + shape.nbytes :] == bytes([_PATTERN]) * _GUARD
    return bytes(target)


def survives(codec: Codec, stream: bytes, shape: PayloadShape) -> bool:
    """Decode anything: wrong values or `CannotDecode`, never more.  True: it was refused."""
    try:
        decode(codec, stream, shape)
    except CannotDecode:
        return True
    return False
