"""Pages on an accelerator: copies to and from the arena on a stream of their own.

This has not run on hardware: it follows torch's documented stream rules and is tested with
CPU tensors, where the stream is a no-op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.integrations.vllm.pages import group_views, part_start, runs
from lmcache_core.memory.arena import Arena


class DevicePages:
    """Like `CpuPages`, for pages in device memory.

    Both directions wait for the compute stream before they copy (block zeroing may be
    pending), and return when the last byte has moved.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        groups: Sequence[tuple[Group, Sequence[str]]],
        *,
        part: int = 0,
    ) -> None:
        self._groups = {group.index: group for group, _ in groups}
        self._views = {g.index: group_views(kv_caches, g, names) for g, names in groups}
        self._part = part
        first = next(iter(self._views.values()))[0]
        self._cuda = first.is_cuda
        device = first.device
        self._compute: Any = torch.cuda.current_stream(device) if self._cuda else None
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy pages into slots."""
        self._move(arena, spans, to_host=True)

    def onboard(self, arena: Arena, spans: Iterable[Span]) -> None:
        """Copy slots into pages."""
        self._move(arena, spans, to_host=False)

    def _move(self, arena: Arena, spans: Iterable[Span], *, to_host: bool) -> None:
        if self._cuda:
            self._stream.wait_stream(self._compute)
        with torch.cuda.stream(self._stream) if self._cuda else nullcontext():
            for span in spans:
                group = self._groups[span.group]
                start = part_start(span, group, self._part)
                part = torch.from_numpy(arena.array[start : start + group.part_bytes])
                rows = part.view(group.layers, group.stored_blocks, group.page_bytes)
                for at, block, count in runs(span):
                    for row, layer in enumerate(self._views[span.group]):
                        host = rows[row, at : at + count]
                        device = layer[block : block + count]
                        target, source = (host, device) if to_host else (device, host)
                        target.copy_(source, non_blocking=True)
        if self._cuda:
            self._stream.synchronize()
