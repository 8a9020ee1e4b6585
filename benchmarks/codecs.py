"""Codecs on one chunk of 32 MiB: ratio, encode and decode, by one thread and by two.

python benchmarks/codecs.py [--out build/bench.json] [--rounds 9] [--kv FILE.npy]

``--kv``: uint16 bits of bfloat16, ``[layers, 2, tokens, heads, head_size]``, repeated to 32 MiB;
without it, values with channels of their own middle and scale, and tokens that are alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import zstandard
from figures import Figure, interleave, median, save, show, spread

from lmcache_core.codecs.cachegen import CacheGen
from lmcache_core.codecs.zstd import Zstd
from lmcache_core.sdk import Codec, KVTensor, PayloadShape

NBYTES = 32 << 20
LAYERS, TOKENS, HEADS, SIZE = 32, 256, 8, 128
TARGETS = {"cachegen": (150.0, 150.0), "zstd": (300.0, 1000.0)}
"""MB/s of one core: encode, decode."""
METHOD = (
    "32 MiB of bfloat16 a thread; MB/s (10**6) of it; limit: memcpy; medians of rounds by turns"
)


@dataclass
class Chunk:
    """A payload, its stream, and room for either; of one thread."""

    codec: Codec
    level: str
    shape: PayloadShape
    payload: memoryview
    stream: memoryview
    back: memoryview
    used: int = 0

    def encode(self) -> None:
        done = self.codec.encode_into(self.payload, self.stream, shape=self.shape, level=self.level)
        self.used = done.nbytes

    def decode(self) -> None:
        self.codec.decode_into(self.stream[: self.used], self.back, shape=self.shape)


def synthetic(seed: int) -> np.ndarray:
    """bfloat16 bits, ``[layers, 2, tokens, heads, size]``."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((LAYERS, 2, TOKENS, HEADS, SIZE), dtype=np.float32)
    for token in range(1, TOKENS):
        values[:, :, token] = 0.5 * values[:, :, token - 1] + 0.87 * values[:, :, token]
    values *= np.exp(0.7 * random.standard_normal((LAYERS, 2, 1, HEADS, SIZE)))
    values += random.standard_normal((LAYERS, 2, 1, HEADS, SIZE))
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def described(layers: int, tokens: int, heads: int, size: int) -> PayloadShape:
    row = heads * size * 2
    plane = tokens * row
    lengths, strides = (layers, 1, tokens, heads, size), (2 * plane, plane, row, size * 2, 2)
    tensors = [
        KVTensor(role=role, offset_bytes=i * plane, shape=lengths, strides_bytes=strides)
        for i, role in enumerate(("key", "value"))
    ]
    return PayloadShape(nbytes=2 * layers * plane, dtype="bfloat16", tensors=tuple(tensors))


def chunk(codec: Codec, level: str, bits: np.ndarray) -> Chunk:
    layers, _, tokens, heads, size = bits.shape
    shape = described(layers, tokens, heads, size)
    room = [memoryview(bytearray(shape.nbytes)) for _ in range(2)]
    return Chunk(codec, level, shape, memoryview(bits.reshape(-1).view(np.uint8)), *room)


def measure(payloads: list[np.ndarray], rounds: int) -> list[Figure]:
    pool = ThreadPoolExecutor(2)

    def both(work: Callable[[Chunk], None], chunks: list[Chunk]) -> None:
        list(pool.map(work, chunks))

    runs: dict[str, Callable[[], object]] = {}
    figures = []
    for codec in (Zstd(), CacheGen()):
        codec.prepare()
        for level in codec.info.levels:
            name = ".".join(part for part in ("codecs", codec.info.name, level) if part)
            chunks = [chunk(codec, level, bits) for bits in payloads]
            for each in chunks:
                each.encode()
            figures.append(ratio(name, chunks[0]))
            runs[f"{name}.encode"] = chunks[0].encode
            runs[f"{name}.decode"] = chunks[0].decode
            runs[f"{name}.encode_2_threads"] = partial(both, Chunk.encode, chunks)
            runs[f"{name}.decode_2_threads"] = partial(both, Chunk.decode, chunks)
    plain = np.ascontiguousarray(payloads[0])
    copy = np.empty_like(plain)
    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    frame = compressor.compress(plain)
    runs["memcpy"] = partial(np.copyto, copy, plain)
    runs["plain zstd-1 encode"] = partial(compressor.compress, plain)
    runs["plain zstd-1 decode"] = partial(decompressor.decompress, frame)
    for run in runs.values():
        run()
    seconds = interleave(runs, rounds)
    return figures + [
        speed(name, seconds, plain.nbytes) for name in runs if name.startswith("codecs.")
    ]


def ratio(name: str, one: Chunk) -> Figure:
    value = one.shape.nbytes / one.used
    return Figure(f"{name}.ratio", value, "x", None, None, None, None, 0.0, "bytes by bytes")


def speed(name: str, seconds: dict[str, list[float]], nbytes: int) -> Figure:
    threads = 2 if name.endswith("_threads") else 1
    kind = "encode" if ".encode" in name else "decode"
    target = TARGETS[name.split(".")[1]][kind == "decode"] * threads
    value = threads * nbytes / 1e6 / median(seconds[name])
    limit = nbytes / 1e6 / median(seconds["memcpy"])
    plain = f"plain zstd-1 {kind}"
    return Figure(
        name=name,
        value=value,
        unit="MB/s",
        limit=limit,
        ratio=value / limit,
        target=target,
        met=value >= target,
        spread=spread(seconds[name]),
        method=METHOD,
        peer={plain: nbytes / 1e6 / median(seconds[plain])},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kv", type=Path)
    options = parser.parse_args()
    if options.kv:
        bits = np.load(options.kv)
        bits = np.concatenate([bits] * max(1, NBYTES // bits.nbytes))
        payloads = [bits, bits]
    else:
        payloads = [synthetic(seed) for seed in range(2)]
    save(measure(payloads, options.rounds), options.out)
    show(options.out)


if __name__ == "__main__":
    main()
