"""Which bytes a move of pages copies: addresses and sizes, in as few copies as possible.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmcache_core.sdk.errors import ContractViolation

I64 = NDArray[np.int64]


class PageMove(NamedTuple):
    """Pages ``[first_block, first_block + blocks)`` of a layer, and where they lie in the arena:
    contiguous from byte ``host_offset``."""

    layer: int
    first_block: int
    blocks: int
    host_offset: int


Moves: TypeAlias = Sequence[PageMove] | I64
"""Or the same as int64 ``[n, 4]``: for tens of thousands, five times as fast."""


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Where a layer's pages are: block ``b`` has ``page_bytes`` bytes at
    ``address + b * block_stride`` (bytes), for ``0 <= b < blocks``.

    ``allocation`` is the address of the device memory that they are part of: no copy goes from
    one to the next, though their addresses may be adjacent.
    """

    address: int
    blocks: int
    page_bytes: int
    block_stride: int
    allocation: int


@dataclass(frozen=True, slots=True)
class CopyBatch:
    """Copies for one call, int64 ``[n]`` each: source and target addresses, sizes in bytes."""

    sources: I64
    targets: I64
    nbytes: I64


def merged_runs(layers: I64, host_nbytes: int, moves: Moves) -> tuple[I64, I64, I64]:
    """Device addresses, host offsets and sizes, int64 ``[n]``, of the fewest copies.

    Pages that follow each other in device memory and on the host are one copy, whatever
    layers they are of: a run of blocks (layer-outer), or of layers (block-outer).

    Args:
        layers: int64 ``[layers, 5]``: the fields of `LayerPages`.

    Raises:
        ContractViolation: a move outside of its layer or of the host memory.
    """
    table = np.asarray(moves, dtype=np.int64).reshape(-1, 4)
    layer, first, count, offset = table.T
    if not np.all((layer >= 0) & (layer < len(layers))):
        raise ContractViolation(f"layers are 0 to {len(layers) - 1}", op="submit")
    address, blocks, page, stride, allocation = layers[layer].T
    inside = (first >= 0) & (count > 0) & (first <= blocks - count)
    if not np.all(inside & (offset >= 0) & (offset <= host_nbytes - count * page)):
        raise ContractViolation("a move is outside of its layer or of the arena", op="submit")
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    device = np.repeat(address + first * stride, count) + within * np.repeat(stride, count)
    host = np.repeat(offset, count) + within * np.repeat(page, count)
    nbytes, part_of = np.repeat(page, count), np.repeat(allocation, count)
    order = np.lexsort((device, host))
    device, host, nbytes, part_of = device[order], host[order], nbytes[order], part_of[order]
    follows = (device[1:] == device[:-1] + nbytes[:-1]) & (host[1:] == host[:-1] + nbytes[:-1])
    follows &= part_of[1:] == part_of[:-1]
    starts = np.flatnonzero(np.concatenate(([len(nbytes) > 0], ~follows)))
    sizes = np.add.reduceat(nbytes, starts) if len(starts) else nbytes
    return device[starts], host[starts], sizes


def overlap(starts: I64, nbytes: I64) -> bool:
    """Whether two of the ranges, int64 ``[n]`` each, share a byte."""
    order = np.argsort(starts)
    return bool(np.any(starts[order][1:] < (starts + nbytes)[order][:-1]))
