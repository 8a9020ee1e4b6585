"""Pages on an accelerator: copies to and from the arena on a stream of their own.

This has not run on hardware: it follows torch's documented stream rules and is tested with
CPU tensors, where the stream is a no-op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.integrations.vllm.pages import page_view, runs
from lmcache_core.memory.arena import Arena
from lmcache_core.sdk import ConfigError


class DevicePages:
    """Like `CpuPages`, for pages in device memory.

    Both directions wait for the compute stream before they copy (block zeroing may be
    pending), and return when the last byte has moved.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks_per_chunk: int) -> None:
        self._layers = [page_view(t, name) for name, t in sorted(kv_caches.items())]
        if len({tuple(layer.shape) for layer in self._layers}) != 1:
            raise ConfigError("layers have pages of different sizes")
        self.page_bytes = int(self._layers[0].shape[1])
        self.payload_bytes = len(self._layers) * blocks_per_chunk * self.page_bytes
        self._blocks_per_chunk = blocks_per_chunk
        self._cuda = self._layers[0].is_cuda
        device = self._layers[0].device
        self._compute: Any = torch.cuda.current_stream(device) if self._cuda else None
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy pages into slots."""
        self._move(arena, spans, to_host=True)

    def onboard(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy slots into pages."""
        self._move(arena, spans, to_host=False)

    def _move(self, arena: Arena, spans: Iterable[Span], *, to_host: bool) -> None:
        shape = (len(self._layers), self._blocks_per_chunk, self.page_bytes)
        if self._cuda:
            self._stream.wait_stream(self._compute)
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            for span in spans:
                start = span.slot_offset + HEADER_BYTES
                slot = torch.from_numpy(arena.array[start : start + self.payload_bytes])
                rows = slot.view(shape)
                for at, block, count in runs(span):
                    for row, layer in enumerate(self._layers):
                        host = rows[row, at : at + count]
                        device = layer[block : block + count]
                        target, source = (host, device) if to_host else (device, host)
                        target.copy_(source, non_blocking=True)
        if self._cuda:
            self._stream.synchronize()
