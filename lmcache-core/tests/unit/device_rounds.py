"""What an engine and its cache do with pages, on any device: each round fails on wrong bytes.

`Rig` is the engine's side; the fake device has one, and so has hardware (tests/gpu).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lmcache_core.transfer.copier import DeviceCopier, DeviceCopy
from lmcache_core.transfer.page_moves import LayerPages, PageMove

U8 = NDArray[np.uint8]
Page = tuple[int, int]
"""Layer, block."""
MOST_POLLS = 1_000_000


class WrongBytes(AssertionError):
    """What no order of the device may ever give."""


class Rig(Protocol):
    layers: Sequence[LayerPages]
    host: U8
    copier: DeviceCopier

    def busy(self) -> None:
        """Give the compute stream something to do first."""

    def write(self, page: Page, data: U8) -> None:
        """Enqueue a write on the compute stream: the model's, or the zeroing of a block."""

    def read_later(self, page: Page) -> Callable[[], U8]:
        """Enqueue a read on the compute stream, as a forward does; the result after `finish`."""

    def read_now(self, page: Page) -> U8:
        """What is in the page now, ordered after nothing."""

    def finish(self) -> None:
        """Let the device run everything."""


def random_moves(
    rng: random.Random, layers: Sequence[LayerPages], host_nbytes: int
) -> list[PageMove]:
    """Moves that overlap nowhere, in any order, with gaps and without."""
    wanted: list[tuple[int, int, int]] = []
    for layer, pages in enumerate(layers):
        block = 0
        while block < pages.blocks:
            count = min(rng.choice((1, 1, 2, 5)), pages.blocks - block)
            if rng.random() < 0.6:
                wanted.append((layer, block, count))
            block += count
    if rng.random() < 0.5:  # block by block: a block-outer layout lies like this on the host
        wanted.sort(key=lambda move: move[1])
    elif rng.random() < 0.5:
        rng.shuffle(wanted)
    moves, at = [], 0
    for layer, first, count in wanted:
        at += rng.choice((0, 0, 3))
        nbytes = count * layers[layer].page_bytes
        if at + nbytes <= host_nbytes:
            moves.append(PageMove(layer, first, count, at))
            at += nbytes
    rng.shuffle(moves)
    return moves


def slots(layers: Sequence[LayerPages], moves: Sequence[PageMove]) -> dict[Page, slice]:
    """Where each page lies on the host: the reference that copies are compared with."""
    found = {}
    for move in moves:
        size = layers[move.layer].page_bytes
        for index in range(move.blocks):
            at = move.host_offset + index * size
            found[move.layer, move.first_block + index] = slice(at, at + size)
    return found


def some_bytes(rng: random.Random, nbytes: int) -> U8:
    return np.frombuffer(rng.randbytes(nbytes), np.uint8)


def end(copy: DeviceCopy, rng: random.Random) -> None:
    """As a worker does: by a fence, or by looking at every step."""
    if rng.random() < 0.3:
        assert copy.wait()
    assert any(copy.done() for _ in range(MOST_POLLS)), "never done"
    assert copy.error() is None


def same(found: U8, expected: U8 | int, what: str) -> None:
    if not np.all(found == expected):
        raise WrongBytes(what)


def store_round(rig: Rig, moves: Sequence[PageMove], rng: random.Random) -> None:
    """The model writes pages, they are stored, the engine reuses them."""
    where = slots(rig.layers, moves)
    model = {page: some_bytes(rng, s.stop - s.start) for page, s in where.items()}
    rig.busy()
    for page, data in model.items():
        rig.write(page, data)
    copy = rig.copier.submit(moves, to_host=True)
    if rng.random() < 0.5:
        assert copy.order_before_compute()
    else:
        end(copy, rng)
    for page, data in model.items():
        rig.write(page, np.full_like(data, 0xAA))
    end(copy, rng)
    for page, s in where.items():
        same(rig.host[s], model[page], f"page {page} stored wrong")
    for s in where.values():  # the slots are the cache's again
        rig.host[s] = 0xBB
    rig.finish()
    for s in where.values():
        same(rig.host[s], 0xBB, "a store wrote late")


def load_round(rig: Rig, moves: Sequence[PageMove], rng: random.Random) -> None:
    """Blocks are allocated and zeroed, then loaded; a forward reads them."""
    where = slots(rig.layers, moves)
    cached = {page: some_bytes(rng, s.stop - s.start) for page, s in where.items()}
    for page, s in where.items():
        rig.host[s] = cached[page]
    rig.busy()
    for page, data in cached.items():
        rig.write(page, np.zeros_like(data))
    copy = rig.copier.submit(moves, to_host=False)
    if rng.random() < 0.5:
        assert copy.order_before_compute()
        seen = {page: rig.read_later(page) for page in where}
        end(copy, rng)
    else:
        end(copy, rng)
        for page in where:
            same(rig.read_now(page), cached[page], f"page {page} not there yet")
        seen = {page: rig.read_later(page) for page in where}
    for s in where.values():  # evicted, and the slots are another chunk's
        rig.host[s] = 0xCC
    rig.finish()
    for page in where:
        same(seen[page](), cached[page], f"page {page} loaded wrong")
        same(rig.read_now(page), cached[page], f"page {page} overwritten later")
