"""The worker's side: copies between pages and the arena, beside the forward pass.

Fence: `handle_step` runs before every forward.  A store still reading a page that the
step may overwrite ends there; a load is reported only when its last copy has returned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmcache_core.cache import ArenaHandle, Attached
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Job, Span, StepMetadata, WorkerMetadata
from lmcache_core.integrations.vllm.movers import Copy, FailedCopy, Mover, PoolMover
from lmcache_core.integrations.vllm.pages import CpuPages
from lmcache_core.logs import logger
from lmcache_core.memory.arena import ArenaError
from lmcache_core.metrics import Deltas, Metrics, Recent

if TYPE_CHECKING:
    import torch

RELEASE_TIMEOUT_S = 5.0
POLL_S = 0.0002


class Worker:
    """One per worker process; called by the model runner's thread only.

    Args:
        groups: every group of pages, with the names of this worker's layers in it.
        rank: of this worker among all.
        workers: all of them; see `Geometry`.
        parts: workers whose bytes differ.
    """

    def __init__(
        self,
        config: EngineConfig,
        groups: Sequence[tuple[Group, Sequence[str]]],
        *,
        rank: int = 0,
        workers: int = 1,
        parts: int = 1,
    ) -> None:
        self._config = config
        self._named_groups = groups
        self._groups = {group.index: group for group, _ in groups}
        self._part, copy = divmod(rank, workers // parts)
        self._stores_part = copy == 0
        self._handle: ArenaHandle | None = None
        self._attached: Attached | None = None
        self._mover: Mover | None = None
        self._on_device = False
        self._await_stores = False
        self._stores: dict[int, tuple[Copy, frozenset[int]]] = {}
        self._loads: dict[int, tuple[Job, Copy]] = {}
        self._finished: set[str] = set()
        self._failed: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._report = WorkerMetadata()
        self._metrics = Metrics()
        self._deltas = Deltas(self._metrics)

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Learn where the pages are.

        Raises:
            ConfigError: pages that this version can't copy, or of an unexpected size.
        """
        self._on_device = {tensor.device.type for tensor in kv_caches.values()} != {"cpu"}
        if self._on_device:
            from lmcache_core.integrations.vllm.device_pages import DeviceMover

            self._mover = DeviceMover(
                kv_caches, self._named_groups, part=self._part, metrics=self._metrics
            )
            return
        pages = CpuPages(kv_caches, self._named_groups, part=self._part)
        self._mover = PoolMover(pages, threads=self._config.copy_threads, metrics=self._metrics)

    def handle_step(self, meta: StepMetadata) -> None:
        """Before the forward: end stores whose pages are about to be overwritten."""
        if meta.arena != self._handle and (meta.loads or meta.stores):
            self._attach(meta.arena)
        self._await_stores = meta.await_stores
        if meta.fence:
            for copy, blocks in self._stores.values():
                if not blocks.isdisjoint(meta.fence):
                    copy.hold_back()

    def start_loads(self, jobs: Sequence[Job]) -> None:
        """Onboard: at once for jobs that the step waits for, else beside it."""
        for job in jobs:
            copy = self._submit(job.spans, to_host=False, now=not job.parked)
            if job.parked:
                self._loads[job.job_id] = (job, copy)
                continue
            copy.wait()
            self._settle_load(job, copy)

    def start_stores(self, jobs: Sequence[Job]) -> None:
        """Offload beside what comes next; the fence keeps the pages as they are."""
        for job in jobs:
            blocks = frozenset(b for span in job.spans for b in span.block_ids)
            # Of copies of the same bytes one is stored.
            spans = job.spans if self._stores_part else ()
            self._stores[job.job_id] = (self._submit(spans, to_host=True), blocks)

    def finished_loads(self) -> set[str]:
        """Requests whose parked load has ended, well or not, since the last call."""
        for job_id, (job, copy) in list(self._loads.items()):
            if copy.done():
                del self._loads[job_id]
                self._settle_load(job, copy)
                self._finished.add(job.req_id)
        finished, self._finished = self._finished, set()
        return finished

    def failed_loads(self) -> set[str]:
        """Requests whose parked load failed since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def failed_blocks(self) -> set[int]:
        """Pages whose load failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> WorkerMetadata | None:
        """Jobs that ended since the last call."""
        if self._await_stores:
            self._wait_for_stores()
        for job_id, (copy, _) in list(self._stores.items()):
            if copy.done():
                del self._stores[job_id]
                self._count(job_id, copy)
        if not (self._report.done or self._report.failed):
            return None
        report, self._report = self._report, WorkerMetadata()
        return report

    def stats(self) -> Recent:
        """What the copies did since the last call."""
        return self._deltas.take()

    def close(self) -> None:
        """End every copy, then unmap."""
        if self._mover is not None:
            self._mover.close()
        self._detach()

    def _wait_for_stores(self) -> None:
        """A decoder waits for them: told now, they leave a whole step earlier."""
        end_s = time.monotonic() + self._config.push_wait_s
        while not all(copy.done() for copy, _ in self._stores.values()):
            if time.monotonic() >= end_s:
                self._metrics.counter("copy.not_awaited").inc()
                return
            time.sleep(POLL_S)

    def _attach(self, handle: ArenaHandle) -> None:
        """Map another arena: the first one, or that of a cache which came back.  Copies in the
        one before end first; in one that can't be mapped they fail, and are reported."""
        if self._mover is not None and not self._mover.release(RELEASE_TIMEOUT_S):
            logger.error("the cache can't be used: copies of the one before do not end")
            return
        self._detach()
        try:
            self._attached = handle.attach(warn=logger.warning, prefault=self._config.prefault)
        except ArenaError as error:
            logger.error("the cache can't be used: %s", error)
            return
        self._handle = handle
        if self._on_device:
            self._attached.arena.pin()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.release()
        self._attached = self._handle = None

    def _submit(self, spans: Sequence[Span], *, to_host: bool, now: bool = False) -> Copy:
        if self._attached is None or self._mover is None:
            return FailedCopy(ArenaError("the cache's memory is not mapped", op="copy"))
        name = "copy.offload_bytes" if to_host else "copy.onboard_bytes"
        copied = sum(len(span.block_ids) * self._block_bytes(span.group) for span in spans)
        self._metrics.counter(name).inc(copied)
        return self._mover.submit(self._attached.arena, spans, to_host=to_host, now=now)

    def _settle_load(self, job: Job, copy: Copy) -> None:
        if self._count(job.job_id, copy):
            return
        if len(self._groups) > 1:
            # A block id means nothing there without its group.
            self._failed.add(job.req_id)
        else:
            self._failed_blocks.update(b for span in job.spans for b in span.block_ids)

    def _count(self, job_id: int, copy: Copy) -> bool:
        error = copy.error()
        if error is not None:
            logger.error("a page copy failed: %r", error)
        tally = self._report.done if error is None else self._report.failed
        tally[job_id] = 1
        return error is None

    def _block_bytes(self, group: int) -> int:
        return self._groups[group].layers * self._groups[group].page_bytes
