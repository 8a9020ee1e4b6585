"""Pages on an accelerator: copies to and from the arena on streams of their own.

This has not run on hardware; docs/device.md says what its tests show.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.integrations.vllm.movers import FailedCopy
from lmcache_core.integrations.vllm.pages import group_views, part_start, runs
from lmcache_core.logs import logger
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.transfer.device import DeviceCopier, DeviceCopy, PageMove, torch_copier

CLOSE_TIMEOUT_S = 5.0


class DeviceMover:
    """`Mover` for pages in device memory; see `lmcache_core.transfer.copier`.

    Args:
        kv_caches, groups, part: as for `CpuPages`.
        metrics: gets the seconds of each copy, up to when it was seen to be done.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        groups: Sequence[tuple[Group, Sequence[str]]],
        *,
        part: int,
        metrics: Metrics,
    ) -> None:
        self._groups = {group.index: group for group, _ in groups}
        self._layers: list[torch.Tensor] = []
        self._first_layer: dict[int, int] = {}
        for group, names in groups:
            self._first_layer[group.index] = len(self._layers)
            self._layers += group_views(kv_caches, group, names)
        self._counts = {group.index: len(names) for group, names in groups}
        self._part = part
        self._metrics = metrics
        self._copier: DeviceCopier | None = None

    def submit(
        self, arena: Arena, spans: Sequence[Span], *, to_host: bool, now: bool = False
    ) -> TimedCopy | FailedCopy:
        """See `Mover.submit`."""
        if self._copier is None:
            self._copier = torch_copier(self._layers, arena.array, warn=logger.warning)
        name = "copy.offload_seconds" if to_host else "copy.onboard_seconds"
        copy = self._copier.submit(self._moves(spans), to_host=to_host)
        return TimedCopy(copy, self._metrics, name)

    def release(self, timeout_s: float) -> bool:
        """See `Mover.release`."""
        closed = self._copier is None or self._copier.close(timeout_s)
        if closed:
            self._copier = None
        return closed

    def close(self) -> None:
        """See `Mover.close`."""
        self.release(CLOSE_TIMEOUT_S)

    def _moves(self, spans: Sequence[Span]) -> list[PageMove]:
        moves = []
        for span in spans:
            group = self._groups[span.group]
            start, first = part_start(span, group, self._part), self._first_layer[span.group]
            layer_bytes = group.stored_blocks * group.page_bytes
            for at, block, count in runs(span):
                for row in range(self._counts[span.group]):
                    offset = start + row * layer_bytes + at * group.page_bytes
                    moves.append(PageMove(first + row, block, count, offset))
        return moves


class TimedCopy:
    """`Copy` of a `DeviceMover`."""

    def __init__(self, copy: DeviceCopy, metrics: Metrics, name: str) -> None:
        self._copy = copy
        self._metrics = metrics
        self._name = name
        self._start_s: float | None = time.perf_counter()

    def done(self) -> bool:
        """See `Copy.done`."""
        done = self._copy.done()
        if done and self._start_s is not None:
            seconds = time.perf_counter() - self._start_s
            self._metrics.histogram(self._name).observe(seconds)
            self._start_s = None
        return done

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._copy.wait()

    def hold_back(self) -> None:
        """See `Copy.hold_back`."""
        if not self._copy.order_before_compute():
            self._copy.wait()

    def error(self) -> BaseException | None:
        """See `Copy.error`."""
        return self._copy.error()
