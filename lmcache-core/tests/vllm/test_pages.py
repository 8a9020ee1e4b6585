"""Pages as opaque bytes: every layout with whole pages, and both copy paths, give them back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmcache_core.envelope import stored_bytes
from lmcache_core.integrations.vllm.device_pages import DeviceMover
from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.integrations.vllm.movers import Mover, PoolMover
from lmcache_core.integrations.vllm.pages import CpuPages, page_view
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import ConfigError

LAYERS, BLOCKS, HEADS, TOKENS, WIDTH = 3, 12, 2, 16, 8
PAGE_BYTES = HEADS * TOKENS * WIDTH * 4
GROUP = Group.of(
    index=0,
    layers=LAYERS,
    block_size=TOKENS,
    page_bytes=PAGE_BYTES,
    window=None,
    chunk_size=4 * TOKENS,
)
NAMES = [f"layer.{i}" for i in range(LAYERS)]


def caches(layout: str) -> dict[str, torch.Tensor]:
    """Logical [B, H, N, C] tensors of each layer, cut from one storage in ``layout``."""
    shape = dict(L=LAYERS, B=BLOCKS, H=HEADS, N=TOKENS, C=WIDTH)
    storage = torch.arange(LAYERS * BLOCKS * HEADS * TOKENS * WIDTH, dtype=torch.float32)
    physical = storage.view([shape[axis] for axis in layout])
    logical = physical.permute([layout.index(axis) for axis in "LBHNC"])
    return {f"layer.{i}": logical[i] for i in range(LAYERS)}


def pool_mover(
    tensors: dict[str, torch.Tensor], group: Group, names: list[str], part: int
) -> Mover:
    pages = CpuPages(tensors, [(group, names)], part=part)
    return PoolMover(pages, threads=2, metrics=Metrics())


def device_mover(
    tensors: dict[str, torch.Tensor], group: Group, names: list[str], part: int
) -> Mover:
    return DeviceMover(tensors, [(group, names)], part=part, metrics=Metrics())


def move(mover: Mover, arena: Arena, spans: list[Span], *, to_host: bool) -> None:
    copy = mover.submit(arena, spans, to_host=to_host)
    copy.wait()
    assert copy.done() and copy.error() is None


MOVERS = pytest.mark.parametrize("make", [pool_mover, device_mover])


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@MOVERS
def test_pages_go_out_and_come_back(layout: str, make: Any) -> None:
    source, target = caches(layout), {k: torch.zeros_like(v) for k, v in caches(layout).items()}
    out, back = make(source, GROUP, NAMES, 0), make(target, GROUP, NAMES, 0)
    slot_bytes = stored_bytes(GROUP.part_bytes)
    arena = Arena.create(2 * slot_bytes, prefault=False, warn=print)
    away = [Span(0, 0, 0, 0, (3, 4, 5, 9)), Span(slot_bytes, 0, 0, 0, (0, 11, 2, 1))]
    home = [Span(0, 0, 0, 1, (7, 6)), Span(slot_bytes, 0, 0, 0, (1, 2, 3, 4))]
    move(out, arena, away, to_host=True)
    move(back, arena, home, to_host=False)
    want = {7: 4, 6: 5, 1: 0, 2: 11, 3: 2, 4: 1}
    for name, tensor in target.items():
        for block in range(BLOCKS):
            original = source[name][want[block]] if block in want else torch.zeros_like(tensor[0])
            assert torch.equal(tensor[block], original), (name, block)
    for mover in (out, back):
        mover.close()


@MOVERS
def test_pipeline_stages_and_tensor_ranks_fill_one_slot(make: Any) -> None:
    """Two stages, of three layers and of two, times two ranks: each moves its part only."""
    parts = [caches("LBHNC") for _ in range(4)]
    for number, tensors in enumerate(parts):
        for name in NAMES:
            tensors[name] = tensors[name] + 1000 * (number + 1)
        if number >= 2:
            del tensors["layer.2"]
    arena = Arena.create(stored_bytes(4 * GROUP.part_bytes), prefault=False, warn=print)
    span = [Span(0, 0, 0, 0, (3, 4, 5, 9))]
    for number, tensors in enumerate(parts):
        mover = make(tensors, GROUP, sorted(tensors), number)
        move(mover, arena, span, to_host=True)
        mover.close()
    for number, tensors in enumerate(parts):
        fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        mover = make(fresh, GROUP, sorted(fresh), number)
        move(mover, arena, span, to_host=False)
        mover.close()
        for name, tensor in fresh.items():
            assert torch.equal(tensor[[3, 4, 5, 9]], tensors[name][[3, 4, 5, 9]]), (number, name)


@pytest.mark.parametrize("layout", ["LHBNC", "BHLNC"])
def test_layouts_without_whole_pages_are_refused(layout: str) -> None:
    with pytest.raises(ConfigError, match="not contiguous"):
        CpuPages(caches(layout), [(GROUP, NAMES)])


def test_a_page_view_is_no_copy() -> None:
    tensor = caches("LBHNC")["layer.1"]
    view = page_view(tensor, "layer.1")
    view[2] = 0
    assert not tensor[2].any()
    assert view.shape == (BLOCKS, HEADS * TOKENS * WIDTH * 4)
    assert np.shares_memory(view.numpy(), tensor.numpy())
