"""Hashing, lookup, and the host tier, each beside a bare loop over the same bytes.

python benchmarks/core.py [--out build/bench.json] [--rounds 15]
"""

from __future__ import annotations

import argparse
import hashlib
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figures import Figure, interleave, median, paired_ratio, save, show, spread

from lmcache_core.config import EngineConfig
from lmcache_core.engine import CacheEngine
from lmcache_core.keys import ChunkHasher, Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena

CHUNK = 256
NAMESPACE = Namespace.of({"model": "bench"})


def open_engine(payload_bytes: int, chunks: int) -> CacheEngine:
    host_bytes = (payload_bytes + 8192) * (chunks + 1)
    config = EngineConfig(host_bytes=host_bytes, chunk_size=CHUNK)
    layout = ChunkLayout(chunk_size=CHUNK, payload_bytes=payload_bytes, description=b"bench")
    arena = Arena.create(host_bytes, prefault=False, warn=print)
    arena.array[:] = 0
    return CacheEngine(config=config, layout=layout, namespace=NAMESPACE, arena=arena)


def bare_chain(tokens: Sequence[int], root: bytes) -> list[bytes]:
    view = memoryview(tokens if isinstance(tokens, np.ndarray) else array("I", tokens)).cast("B")
    sha256, step, out, digest = hashlib.sha256, CHUNK * 4, [], root
    for i in range(0, len(view) - step + 1, step):
        digest = sha256(digest + view[i : i + step]).digest()
        out.append(digest)
    return out


def hashing(rounds: int) -> list[Figure]:
    rng = random.Random(1)
    tokens = [rng.randrange(128_000) for _ in range(102_400)]
    hasher = ChunkHasher(NAMESPACE, chunk_size=CHUNK)
    figures = []
    for kind, source in (("list", tokens), ("int32", np.array(tokens, np.int32))):
        seconds = interleave(
            {
                "ours": lambda s=source: hasher.digests(s),
                "raw": lambda s=source: bare_chain(s, b"0" * 32),
            },
            rounds * 4,
        )
        ratio = paired_ratio(seconds["ours"], seconds["raw"])
        figures.append(
            Figure(
                name=f"hash.{kind}",
                value=len(tokens) / median(seconds["ours"]) / 1e6,
                unit="Mtok/s",
                limit=len(tokens) / median(seconds["raw"]) / 1e6,
                ratio=ratio,
                target=1.15,
                met=ratio <= 1.15,
                spread=spread(seconds["ours"]),
                method="time over a bare array('I') + SHA-256 chain, 100k tokens, interleaved",
            )
        )
    return figures


def lookup(rounds: int) -> list[Figure]:
    rng = random.Random(2)
    tokens = [rng.randrange(128_000) for _ in range(32_768)]
    engine = open_engine(4096, 130)
    pages = ArrayPages(np.zeros((128, 4096), np.uint8))
    engine.store(tokens, pages)
    assert engine.lookup(tokens).tokens == len(tokens)
    known = dict.fromkeys(bare_chain(tokens, b"0" * 32))

    def raw() -> int:
        count = 0
        for digest in bare_chain(tokens, b"0" * 32):
            if digest not in known:
                break
            count += 1
        return count

    seconds = interleave({"ours": lambda: engine.lookup(tokens), "raw": raw}, rounds * 8)
    ratio = paired_ratio(seconds["ours"], seconds["raw"])
    engine.close()
    return [
        Figure(
            name="lookup.host_32k",
            value=median(seconds["ours"]) * 1e3,
            unit="ms",
            limit=median(seconds["raw"]) * 1e3,
            ratio=ratio,
            target=1.15,
            met=ratio <= 1.15,
            spread=spread(seconds["ours"]),
            method="32,768 tokens from a list, all resident, over bare hash chain + dict",
        )
    ]


class ArrayPages:
    """Chunks in one array: what a device's pages would be."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def offload(self, index: int, slot: np.ndarray) -> None:
        np.copyto(slot, self.data[index])

    def onboard(self, index: int, slot: np.ndarray) -> None:
        np.copyto(self.data[index], slot)


class NoPages:
    """Moves nothing: what is left is what the engine adds to the copies."""

    def offload(self, index: int, slot: np.ndarray) -> None:
        pass

    def onboard(self, index: int, slot: np.ndarray) -> None:
        pass


def host(rounds: int) -> list[Figure]:
    figures = []
    for label, payload, chunks in (("1MiB", 1 << 20, 256), ("32MiB", 32 << 20, 16)):
        figures += host_of_size(rounds, label, payload, chunks)
    return figures


def host_of_size(rounds: int, label: str, payload: int, chunks: int) -> list[Figure]:
    engine, tokens = open_engine(payload, chunks), list(range(CHUNK * chunks))
    source = ArrayPages(np.random.default_rng(0).integers(0, 255, (chunks, payload), np.uint8))
    target = ArrayPages(np.ones((chunks, payload), np.uint8))
    none = NoPages()

    def slots() -> list[np.ndarray]:
        found = [engine.host.get(key) for key in engine.keys(tokens)]
        return [engine.host.payload(chunk) for chunk in found if chunk is not None]

    def empty() -> None:
        engine.clear()

    def full() -> None:
        if not engine.host.keys():
            engine.store(tokens, source)

    def raw_retrieve() -> None:
        for into, slot in zip(target.data, held):
            np.copyto(into, slot)

    def raw_store() -> None:
        for slot, page in zip(held, source.data):
            np.copyto(slot, page)

    full()
    # The raw copy moves the same bytes between the same two stretches of memory.
    held = slots()
    assert len(held) == chunks
    stores = {
        "ours": lambda: engine.store(tokens, source),
        "raw": raw_store,
        "empty": lambda: engine.store(tokens, none),
    }
    seconds = {"store": interleave(stores, rounds, empty)}
    empty()
    full()
    retrieves = {
        "ours": lambda: engine.retrieve(tokens, target),
        "raw": raw_retrieve,
        "empty": lambda: engine.retrieve(tokens, none),
    }
    seconds["retrieve"] = interleave(retrieves, rounds, full)
    engine.retrieve(tokens, target)
    assert np.array_equal(source.data, target.data)
    engine.close()
    gib = chunks * payload / (1 << 30)
    figures = []
    for op, times in seconds.items():
        ratio = 1 / paired_ratio(times["ours"], times["raw"])
        above_us = median(times["empty"]) / chunks * 1e6
        figures += [
            Figure(
                name=f"host.{op}_{label}",
                value=gib / median(times["ours"]),
                unit="GiB/s",
                limit=gib / median(times["raw"]),
                ratio=ratio,
                target=0.90,
                met=ratio >= 0.90,
                spread=spread(times["ours"]),
                method=f"{chunks} chunks, hashing from a list included, speed over numpy copyto",
            ),
            Figure(
                name=f"host.{op}_{label}_overhead",
                value=above_us,
                unit="us/chunk",
                limit=None,
                ratio=None,
                target=15.0,
                met=above_us <= 15.0,
                spread=spread(times["empty"]),
                method="the same call with pages that copy nothing, hashing included",
            ),
        ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    save([*hashing(args.rounds), *lookup(args.rounds), *host(args.rounds)], args.out)
    show(args.out)


if __name__ == "__main__":
    main()
