"""A chunk's keys and values as the bytes of an engine's pages, and back.

Such pages are what codecs are told of by `lmcache_core.integrations.vllm`: a payload is
``[layers, blocks, page]``, and the strides of its arrays say what lies where in a page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache_core.layout import ChunkLayout
from lmcache_core.quality.plan import Plan
from lmcache_core.sdk import ELEMENT_BYTES, KVTensor, PayloadShape

if TYPE_CHECKING:
    import torch

ROLES = ("key", "value")


def chunk_layout(plan: Plan, *, layers: int, heads: int, head_size: int) -> ChunkLayout:
    """Layout of a chunk of ``plan`` for a model of these sizes."""
    tokens, size = plan.block_tokens, ELEMENT_BYTES[plan.dtype]
    if plan.pages == "cpu":
        # For each head the keys as [head_size, tokens], then the values as [tokens, head_size].
        row = 2 * tokens * head_size
        starts = (0, tokens * head_size)
        strides = ((1, row, tokens), (head_size, row, 1))
    else:
        # For each token and head the key, then the value.
        row = 2 * head_size
        starts = (0, head_size)
        strides = ((heads * row, row, 1), (heads * row, row, 1))
    blocks, page = plan.chunk_tokens // tokens, 2 * tokens * heads * head_size * size
    tensors = tuple(
        KVTensor(
            role=role,
            offset_bytes=start * size,
            shape=(layers, blocks, tokens, heads, head_size),
            strides_bytes=(blocks * page, page, token * size, head * size, channel * size),
        )
        for role, start, (token, head, channel) in zip(ROLES, starts, strides)
    )
    nbytes = layers * blocks * page
    return ChunkLayout(
        chunk_size=plan.chunk_tokens,
        payload_bytes=nbytes,
        description=repr(plan).encode(),
        shape=PayloadShape(nbytes=nbytes, dtype=plan.dtype, tensors=tensors),
    )


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
