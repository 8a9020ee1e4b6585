"""A chunk's keys and values as the bytes of an engine's pages, and back.

Such pages are what codecs are told of by `lmcache_core.integrations.vllm`: a payload is
``[layers, blocks, page]``, and the strides of its arrays say what lies where in a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_core.integrations.vllm.geometry import Geometry, Group, PageAxes
from lmcache_core.layout import ChunkLayout
from lmcache_core.quality.plan import Plan
from lmcache_core.sdk import ELEMENT_BYTES

if TYPE_CHECKING:
    import torch


def chunk_layout(plan: Plan, *, layers: int, heads: int, head_size: int) -> ChunkLayout:
    """Layout of a chunk of ``plan`` for a model of these sizes."""
    sizes = {"tokens": plan.block_tokens, "heads": heads, "head_size": head_size}
    if plan.pages == "cpu":
        axes = PageAxes.keys_transposed(plan.dtype, **sizes)
    else:
        axes = PageAxes.rows(plan.dtype, **sizes, tokens_inside=False)
    group = Group.of(
        index=0,
        layers=layers,
        block_size=plan.block_tokens,
        page_bytes=2 * plan.block_tokens * heads * head_size * ELEMENT_BYTES[plan.dtype],
        window=None,
        chunk_size=plan.chunk_tokens,
        axes=axes,
    )
    geometry = Geometry.of(
        [group],
        chunk_size=plan.chunk_tokens,
        hit_step=plan.chunk_tokens,
        parts=1,
        workers=1,
        description=repr(plan).encode(),
    )
    return geometry.kinds[0].layout


def pack(kv: torch.Tensor, layout: ChunkLayout) -> bytearray:
    """The payload of one chunk.

    Args:
        kv: ``[layers, 2, chunk_tokens, heads, head_size]``, keys first; of the payload's dtype.
    """
    payload = bytearray(layout.payload_bytes)
    for view, part in zip(_views(payload, layout), kv.unbind(1)):
        view.copy_(part.reshape(view.shape))
    return payload


def unpack(payload: bytearray | memoryview, layout: ChunkLayout) -> torch.Tensor:
    """The reverse of `pack`: a copy, ``[layers, 2, chunk_tokens, heads, head_size]``."""
    import torch

    views = _views(payload, layout)
    return torch.stack([view.flatten(1, 2) for view in views], dim=1)


def _views(payload: bytearray | memoryview, layout: ChunkLayout) -> list[Any]:
    """Strided views of the payload's arrays, each with the axes of `KVTensor`."""
    import torch

    shape = layout.shape
    flat = torch.frombuffer(payload, dtype=getattr(torch, shape.dtype))
    return [
        torch.as_strided(
            flat,
            tensor.shape,
            [step // shape.element_bytes for step in tensor.strides_bytes],
            tensor.offset_bytes // shape.element_bytes,
        )
        for tensor in shape.tensors
    ]
