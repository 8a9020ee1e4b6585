"""A node server encodes for its engines: they tell it the axes of their chunks, which it checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from node_support import LAYOUT, VERSION, Raw, client, keys_of, running, serving, until

from lmcache_core.cache import Refusal
from lmcache_core.layout import ChunkLayout, LayoutSpec, TensorSpec
from lmcache_core.node.protocol import Refused
from lmcache_core.sdk import KVTensor, PayloadShape

TOKENS, LAYERS, HEADS, SIZE = 64, 2, 2, 32
NBYTES = LAYERS * 2 * HEADS * TOKENS * SIZE * 2
PAGE = NBYTES // LAYERS


def shape() -> PayloadShape:
    """Keys transposed beside values, as vLLM's CPU pages."""
    head = 4 * TOKENS * SIZE
    return PayloadShape(
        nbytes=NBYTES,
        dtype="bfloat16",
        tensors=(
            KVTensor(
                role="key",
                offset_bytes=0,
                shape=(LAYERS, 1, TOKENS, HEADS, SIZE),
                strides_bytes=(PAGE, PAGE, 2, head, 2 * TOKENS),
            ),
            KVTensor(
                role="value",
                offset_bytes=2 * TOKENS * SIZE,
                shape=(LAYERS, 1, TOKENS, HEADS, SIZE),
                strides_bytes=(PAGE, PAGE, 2 * SIZE, head, 2),
            ),
        ),
    )


CODED = ChunkLayout(chunk_size=16, payload_bytes=NBYTES, description=b"coded", shape=shape())


def bfloats(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 1, NBYTES // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("codec", ["zstd", "cachegen"])
def test_chunks_of_an_engine_lie_encoded_on_the_servers_tier(tmp_path: Path, codec: str) -> None:
    tiers = [
        {"host": "4MiB"},
        {"url": f"file://{tmp_path}/kv", "codec": codec, "deadline_s": 60.0},
    ]
    keys = keys_of("coded", 3)
    with running(tmp_path, tiers=tiers) as (server, path), client(path, layouts=(CODED,)) as one:
        for number, slot in enumerate(one.reserve(keys)):
            assert not isinstance(slot, Refusal)
            one.payload(slot)[:] = bfloats(number).view(np.uint8)
            one.cache.commit([slot])
        counter = server.engine.metrics.counter(f"disk.encoded.{codec}")
        one.load([])
        until(lambda: counter.value == 3, "three encoded chunks", 60.0)
    with serving(tmp_path, tiers=[{"host": "4MiB"}, {"url": f"file://{tmp_path}/kv"}]) as again:
        limits = {"layouts": (CODED,), "lookup_deadline_s": 60.0}
        with client(again.socket, **limits) as one:
            ticket = one.cache.prefetch(keys)
            until(lambda: one.cache.poll() or ticket.done, "an answer", 60.0)
            hits = ticket.hits()
            assert len(hits) == 3
            for number, slot in enumerate(hits):
                found = one.payload(slot).view(np.uint16)
                if codec == "zstd":
                    assert np.array_equal(found, bfloats(number))
                now, was = (
                    (bits.astype(np.uint32) << 16).view(np.float32)
                    for bits in (found, bfloats(number))
                )
                assert np.sqrt(np.mean((now - was) ** 2)) < 0.2
            one.cache.release(ticket)
            assert again.counter(f"disk.decoded.{codec}") == 3


def test_a_layout_travels_whole() -> None:
    assert LayoutSpec.of(CODED).layout() == CODED
    assert LayoutSpec.of(LAYOUT).layout() == LAYOUT


@pytest.mark.parametrize(
    "tensor",
    [
        TensorSpec("key", 0, (LAYERS, 1, TOKENS, HEADS, SIZE), (1 << 40, PAGE, 2, 2, 2)),
        TensorSpec("key", NBYTES, (1, 1, 1, 1, 1), (2, 2, 2, 2, 2)),
        TensorSpec("key", 0, (1, 1, 1, 1, 1), (2, 2, 2, 2, 2)),
        TensorSpec("other", 0, (1, 1, 1, 1, NBYTES // 2), (2, 2, 2, 2, 2)),
    ],
)
def test_axes_that_are_not_the_payload_are_refused(tmp_path: Path, tensor: TensorSpec) -> None:
    spec = LayoutSpec(16, NBYTES, b"wrong", "bfloat16", (tensor,))
    with running(tmp_path) as (_, path):
        answer = Raw(path).hello(layouts=(spec,))
        assert isinstance(answer, Refused)
        assert answer.reason == "layout"
        assert Raw(path).hello("control", version=VERSION).incarnation
