"""An engine and its copier on the fake device, and rounds that only make sense there."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import device_rounds as rounds
import numpy as np
from device_rounds import U8, Page
from fake_device import DeviceError, FakeDevice, layers_of

from lmcache_core.transfer.copier import DeviceCopier, DeviceCopy
from lmcache_core.transfer.page_moves import PageMove

HOST_NBYTES = 4096
SEEDS = range(40)
ONE = [PageMove(0, 2, 1, 64)]


class FakeRig:
    """An engine on a `FakeDevice`: 3 layers of 8 blocks, unless told otherwise."""

    def __init__(
        self,
        seed: int = 0,
        *,
        fake: type[FakeDevice] = FakeDevice,
        outer: str = "layer",
        pages: Sequence[int] = (16, 16, 16),
        gap: int = 0,
        pinned: bool = True,
        **options: Any,
    ) -> None:
        self.layers, nbytes = layers_of(outer, list(pages), 8, gap)
        self.device = fake(seed, device_nbytes=nbytes, host_nbytes=HOST_NBYTES, pinned=pinned)
        self.host = self.device.host
        self.warnings: list[str] = []
        clock = SimpleNamespace(now_s=0.0)

        def sleep(seconds: float) -> None:
            clock.now_s += seconds
            self.device.step()

        self.copier = DeviceCopier(
            self.layers,
            self.device,
            warn=self.warnings.append,
            now_s=lambda: clock.now_s,
            sleep=sleep,
            **options,
        )
        self.rng = random.Random(seed)

    def busy(self) -> None:
        for _ in range(self.rng.randrange(5)):
            self.device.launch(lambda: None)

    def write(self, page: Page, data: U8) -> None:
        self.device.launch(lambda: np.copyto(self._at(page), data))

    def read_later(self, page: Page) -> Callable[[], U8]:
        seen: list[U8] = []
        self.device.launch(lambda: seen.append(self._at(page).copy()))
        return lambda: seen[0]

    def read_now(self, page: Page) -> U8:
        return self._at(page).copy()

    def finish(self) -> None:
        self.device.finish()

    def moves(self) -> list[PageMove]:
        return rounds.random_moves(self.rng, self.layers, HOST_NBYTES)

    def store(self, moves: Sequence[PageMove] | None = None) -> DeviceCopy:
        return self.copier.submit(self.moves() if moves is None else moves, to_host=True)

    def _at(self, page: Page) -> U8:
        layer = self.layers[page[0]]
        return self.device.at(layer.address + page[1] * layer.block_stride, layer.page_bytes)


def chain(rig: FakeRig, *, ordered: bool = True) -> None:
    """Load, store what was loaded elsewhere, load over it, store that: no thread waits."""
    first, second = rounds.some_bytes(rig.rng, 64), rounds.some_bytes(rig.rng, 64)
    rig.host[:64], rig.host[64:128] = first, second
    copies = []
    for offset, to_host in ((0, False), (1024, True), (64, False), (2048, True)):
        copies.append(rig.copier.submit([PageMove(1, 3, 4, offset)], to_host=to_host))
        assert not ordered or copies[-1].order_before_compute()
    assert all(copy.wait() and copy.error() is None for copy in copies)
    rounds.same(rig.host[1024:1088], first, "stored before the load, or after the next")
    rounds.same(rig.host[2048:2112], second, "stored before the load")


def copy_thread(rig: FakeRig, *, fenced: bool) -> None:
    """A store submitted by a thread whose current stream is not the model runner's."""
    model = rounds.some_bytes(rig.rng, 16)
    rig.write((0, 2), model)
    fence = rig.copier.fence() if fenced else None
    rig.device.current = rig.device.add_stream("default of the copy thread")
    copy = rig.copier.submit(ONE, to_host=True, after=fence)
    assert copy.wait()
    rounds.same(rig.host[64:80], model, "read before the model wrote it")


def failing_load(rig: FakeRig, call: str) -> None:
    """The engine gets the blocks back when the copy is done, and writes them."""
    moves = [PageMove(0, 0, 1, 0), PageMove(0, 4, 1, 500)]
    rig.device.failures[call] = 1
    copy = rig.copier.submit(moves, to_host=False)
    copy.wait()
    assert any(copy.done() for _ in range(1000))
    assert isinstance(copy.error(), DeviceError)
    pages = [(0, 0), (0, 4)]
    for page in pages:
        np.copyto(rig._at(page), 9)
    rig.finish()
    for page in pages:
        rounds.same(rig.read_now(page), 9, "written after done")
