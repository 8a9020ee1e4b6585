"""The engine's pages as opaque bytes: spans over (layer, block, page) for any layout.

A page is the bytes of one block in one layer.  Nothing here looks inside: on the CPU
backend K is transposed in a page, and packed differently with AMX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.memory.arena import Arena
from lmcache_core.sdk import ConfigError

if TYPE_CHECKING:
    import torch

U8 = npt.NDArray[np.uint8]


def page_view(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """``tensor`` (logical ``[blocks, ...]``) as uint8 ``[blocks, page_bytes]``, no copy.

    Raises:
        ConfigError: a block's bytes are not contiguous (a layout with heads outside blocks).
    """
    import torch

    inner = sorted(zip(tensor.stride()[1:], tensor.shape[1:]), reverse=True)
    expected = tensor[0].numel()
    for stride, size in inner:
        expected //= size
        if size > 1 and stride != expected:
            raise ConfigError(
                f"pages of layer {name} are not contiguous: shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}",
                hint="use a KV cache layout with heads inside blocks, such as LBHNC or LBNHC",
            )
    item = tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * item,
        (tensor.shape[0], tensor[0].numel() * item),
        (tensor.stride(0) * item, 1),
    )


def group_views(
    kv_caches: Mapping[str, torch.Tensor], group: Group, names: Sequence[str]
) -> list[torch.Tensor]:
    """Pages of this worker's layers of ``group``, in the order of their names.

    Raises:
        ConfigError: pages of another size than the scheduler reckons with.
    """
    views = [page_view(kv_caches[name], name) for name in sorted(names)]
    for view, name in zip(views, sorted(names)):
        if view.shape[1] != group.page_bytes:
            raise ConfigError(
                f"a page of layer {name} has {view.shape[1]} bytes in this worker, "
                f"{group.page_bytes} by the scheduler",
                hint="all layers must have the page size of their KV cache specification",
            )
    if len(views) > group.layers:
        raise ConfigError(f"{len(views)} layers in a group of at most {group.layers}")
    return views


class CpuPages:
    """Copies between pages in host memory and slots of the arena.

    Thread-safe for spans that do not overlap; numpy releases the GIL while it copies.

    Args:
        kv_caches: layer name to tensor, as vLLM registers them.
        groups: each with the names of this worker's layers in it.
        part: number of this worker's bytes in every slot.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        groups: Sequence[tuple[Group, Sequence[str]]],
        *,
        part: int = 0,
    ) -> None:
        self._groups = {group.index: group for group, _ in groups}
        self._views = {
            group.index: _as_one([v.numpy() for v in group_views(kv_caches, group, names)])
            for group, names in groups
        }
        self._part = part

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy pages into slots."""
        for slot, pages in self._pairs(arena, spans):
            np.copyto(slot, pages)

    def onboard(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy slots into pages."""
        for slot, pages in self._pairs(arena, spans):
            np.copyto(pages, slot)

    def _pairs(self, arena: Arena, spans: Iterable[Span]) -> Iterable[tuple[U8, U8]]:
        for span in spans:
            group = self._groups[span.group]
            start = part_start(span, group, self._part)
            shape = (group.layers, group.stored_blocks, group.page_bytes)
            part = arena.array[start : start + group.part_bytes].reshape(shape)
            for at, block, count in runs(span):
                row = 0
                for view in self._views[span.group]:
                    rows = part[row : row + view.shape[0], at : at + count]
                    yield rows, view[:, block : block + count]
                    row += view.shape[0]


def part_start(span: Span, group: Group, part: int) -> int:
    """Where a worker's bytes of ``span``'s group start in the arena."""
    return span.slot_offset + HEADER_BYTES + span.at + part * group.part_bytes


def runs(span: Span) -> Iterable[tuple[int, int, int]]:
    """(index among the stored blocks, first block id, count) of each run of consecutive ids."""
    ids = span.block_ids
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[end - 1] + 1:
            yield span.first_block + start, ids[start], end - start
            start = end


def _as_one(layers: list[U8]) -> list[U8]:
    """One ``[layers, blocks, page]`` view when the layers are evenly spaced in memory."""
    step = layers[1].ctypes.data - layers[0].ctypes.data if len(layers) > 1 else 0
    even = all(b.ctypes.data - a.ctypes.data == step for a, b in pairwise(layers))
    if step <= 0 or not even or len({layer.strides for layer in layers}) != 1:
        return [layer[np.newaxis] for layer in layers]
    view: Any = np.lib.stride_tricks.as_strided(
        layers[0], (len(layers), *layers[0].shape), (step, *layers[0].strides)
    )
    return [view]
