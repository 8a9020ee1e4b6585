"""The engine's pages as opaque bytes: spans over (layer, block, page) for any layout.

A page is the bytes of one block in one layer.  Nothing here looks inside: on the CPU
backend K is transposed in a page, and packed differently with AMX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmcache_core.envelope import HEADER_BYTES
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


class CpuPages:
    """Copies between pages in host memory and slots of the arena.

    Thread-safe for spans that do not overlap; numpy releases the GIL while it copies.

    Args:
        kv_caches: layer name to tensor, as vLLM registers them.
        blocks_per_chunk: blocks in a chunk.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks_per_chunk: int) -> None:
        layers = [page_view(t, name).numpy() for name, t in sorted(kv_caches.items())]
        if len({layer.shape for layer in layers}) != 1:
            raise ConfigError("layers have pages of different sizes")
        self.page_bytes = layers[0].shape[1]
        self.payload_bytes = len(layers) * blocks_per_chunk * self.page_bytes
        self._blocks_per_chunk = blocks_per_chunk
        self._views = _as_one(layers)

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy pages into slots."""
        for slot, pages in self._pairs(arena, spans):
            np.copyto(slot, pages)

    def onboard(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy slots into pages."""
        for slot, pages in self._pairs(arena, spans):
            np.copyto(pages, slot)

    def _pairs(self, arena: Arena, spans: Iterable[Span]) -> Iterable[tuple[U8, U8]]:
        layers = sum(view.shape[0] for view in self._views)
        shape = (layers, self._blocks_per_chunk, self.page_bytes)
        for span in spans:
            start = span.slot_offset + HEADER_BYTES
            slot = arena.array[start : start + self.payload_bytes].reshape(shape)
            for at, block, count in runs(span):
                row = 0
                for view in self._views:
                    rows = slot[row : row + view.shape[0], at : at + count]
                    yield rows, view[:, block : block + count]
                    row += view.shape[0]


def runs(span: Span) -> Iterable[tuple[int, int, int]]:
    """(index in chunk, first block id, count) of each run of consecutive ids."""
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
