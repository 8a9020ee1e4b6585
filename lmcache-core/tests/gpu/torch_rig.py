"""An engine on torch tensors, on CUDA or on the CPU, for the rounds of `device_rounds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from device_rounds import U8, Page

from lmcache_core.memory.arena import Arena
from lmcache_core.transfer.device import layer_pages, torch_copier

BUSY_CYCLES = 50_000_000
"""About 30 ms of a GPU: longer than the test takes to enqueue a round."""


def tensors_of(
    outer: str, pages: Sequence[int], blocks: int, gap: int, device: str
) -> list[torch.Tensor]:
    """uint8 ``[blocks, page_bytes]`` views in the layouts of `fake_device.layers_of`."""
    if outer == "block":
        whole = torch.zeros(blocks, sum(pages) + gap, dtype=torch.uint8, device=device)
        starts = np.cumsum([0, *pages[:-1]]).tolist()
        return [whole[:, start : start + page] for start, page in zip(starts, pages)]
    if outer == "apart":
        return [
            torch.zeros(blocks, page + gap, dtype=torch.uint8, device=device)[:, :page]
            for page in pages
        ]
    flat = torch.zeros(
        sum(blocks * (page + gap) for page in pages), dtype=torch.uint8, device=device
    )
    views, at = [], 0
    for page in pages:
        region = flat[at : at + blocks * (page + gap)].view(blocks, page + gap)
        views.append(region[:, :page])
        at += blocks * (page + gap)
    return views


class TorchRig:
    """`device_rounds.Rig` with the arena as host memory, pinned on CUDA."""

    def __init__(
        self,
        device: str,
        *,
        outer: str = "layer",
        pages: Sequence[int] = (4096, 4096, 4096),
        blocks: int = 8,
        gap: int = 0,
        host_nbytes: int = 1 << 20,
        pin: bool = True,
        max_batch: int = 4096,
    ) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.tensors = tensors_of(outer, pages, blocks, gap, device)
        self.layers = [layer_pages(tensor) for tensor in self.tensors]
        self.warnings: list[str] = []
        self.arena = Arena.create(
            host_nbytes, huge_pages=False, prefault=False, warn=self.warnings.append
        )
        if self.cuda and pin:
            assert self.arena.pin(), self.warnings
        self.host = self.arena.array
        self.copier = torch_copier(
            self.tensors, self.host, warn=self.warnings.append, max_batch=max_batch
        )
        self.side = torch.cuda.Stream() if self.cuda else torch.cpu.Stream()
        self.kept: list[torch.Tensor] = []

    def close(self) -> None:
        self.finish()
        assert self.copier.close(10)
        del self.copier, self.host
        assert self.arena.close()

    def on_side(self) -> torch.cuda.StreamContext | torch.cpu.StreamContext:
        """Away from the compute stream: what blocks here does not wait for it."""
        return torch.cuda.stream(self.side) if self.cuda else torch.cpu.stream(self.side)

    def busy(self) -> None:
        if self.cuda:
            torch.cuda._sleep(BUSY_CYCLES)

    def write(self, page: Page, data: U8) -> None:
        with self.on_side():
            source = torch.from_numpy(data.copy()).to(self.tensors[0].device)
        self.kept.append(source)
        self._at(page).copy_(source)

    def read_later(self, page: Page) -> Callable[[], U8]:
        read = self._at(page).clone()
        return lambda: read.cpu().numpy()

    def read_now(self, page: Page) -> U8:
        with self.on_side():
            found: U8 = self._at(page).cpu().numpy()
        return found

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.kept.clear()

    def _at(self, page: Page) -> torch.Tensor:
        return self.tensors[page[0]][page[1]]
