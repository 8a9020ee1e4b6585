"""The worker's side: copies between pages and the arena, beside the forward pass.

Fence: `handle_step` runs before every forward.  A store still reading a page that the
step may overwrite ends there; a load is reported only when its last copy has returned.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

from lmcache_core.cache import ArenaHandle, Attached
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import Job, Span, StepMetadata, WorkerMetadata
from lmcache_core.integrations.vllm.pages import CpuPages
from lmcache_core.logs import logger
from lmcache_core.memory.arena import Arena, ArenaError
from lmcache_core.metrics import Deltas, Metrics, Recent

if TYPE_CHECKING:
    import torch


class Pages(Protocol):
    """The engine's pages: `CpuPages` or `DevicePages`."""

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None: ...
    def onboard(self, arena: Arena, spans: Iterable[Span]) -> None: ...


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
        self._pages: Pages | None = None
        self._pool = ThreadPoolExecutor(config.copy_threads, "lmc-copy")
        self._stores: dict[int, tuple[list[Future[None]], frozenset[int]]] = {}
        self._loads: dict[int, tuple[Job, list[Future[None]]]] = {}
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
        devices = {tensor.device.type for tensor in kv_caches.values()}
        if devices == {"cpu"}:
            self._pages = CpuPages(kv_caches, self._named_groups, part=self._part)
        else:
            from lmcache_core.integrations.vllm.device_pages import DevicePages

            self._pages = DevicePages(kv_caches, self._named_groups, part=self._part)

    def handle_step(self, meta: StepMetadata) -> None:
        """Before the forward: end stores whose pages are about to be overwritten."""
        if meta.arena != self._handle and (meta.loads or meta.stores):
            self._attach(meta.arena)
        if meta.fence:
            for futures, blocks in self._stores.values():
                if not blocks.isdisjoint(meta.fence):
                    wait(futures)

    def start_loads(self, jobs: Sequence[Job]) -> None:
        """Onboard: at once for jobs that the step waits for, else beside it."""
        for job in jobs:
            spans = list(job.spans)
            if job.parked:
                self._loads[job.job_id] = (job, self._split("onboard", spans))
                continue
            mine = spans[:: self._config.copy_threads]
            others = [s for i, s in enumerate(spans) if i % self._config.copy_threads]
            futures = self._split("onboard", others)
            own: Future[None] = Future()
            try:
                self._copy("onboard", mine)
                own.set_result(None)
            except Exception as error:  # reported to the engine as a failed load
                own.set_exception(error)
            wait(futures)
            self._settle_load(job, [own, *futures])

    def start_stores(self, jobs: Sequence[Job]) -> None:
        """Offload beside what comes next; the fence keeps the pages as they are."""
        for job in jobs:
            blocks = frozenset(b for span in job.spans for b in span.block_ids)
            # Of copies of the same bytes one is stored.
            spans = list(job.spans) if self._stores_part else []
            self._stores[job.job_id] = (self._split("offload", spans), blocks)

    def finished_loads(self) -> set[str]:
        """Requests whose parked load has ended, well or not, since the last call."""
        for job_id, (job, futures) in list(self._loads.items()):
            if all(future.done() for future in futures):
                del self._loads[job_id]
                self._settle_load(job, futures)
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
        for job_id, (futures, _) in list(self._stores.items()):
            if all(future.done() for future in futures):
                del self._stores[job_id]
                self._count(job_id, futures)
        if not (self._report.done or self._report.failed):
            return None
        report, self._report = self._report, WorkerMetadata()
        return report

    def stats(self) -> Recent:
        """What the copies did since the last call."""
        return self._deltas.take()

    def close(self) -> None:
        """End every copy, then unmap."""
        self._pool.shutdown(wait=True, cancel_futures=False)
        self._detach()

    def _attach(self, handle: ArenaHandle) -> None:
        """Map another arena: the first one, or that of a cache which came back.  Copies in the
        one before end first; in one that can't be mapped they fail, and are reported."""
        for futures, _ in self._stores.values():
            wait(futures)
        for _, loading in self._loads.values():
            wait(loading)
        self._detach()
        try:
            self._attached = handle.attach(warn=logger.warning, prefault=self._config.prefault)
        except ArenaError as error:
            logger.error("the cache can't be used: %s", error)
            return
        self._handle = handle
        if self._pages is not None and not isinstance(self._pages, CpuPages):
            self._attached.arena.pin()

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.release()
        self._attached = self._handle = None

    def _settle_load(self, job: Job, futures: Sequence[Future[None]]) -> None:
        if self._count(job.job_id, futures):
            return
        if len(self._groups) > 1:
            # A block id means nothing there without its group.
            self._failed.add(job.req_id)
        else:
            self._failed_blocks.update(b for span in job.spans for b in span.block_ids)

    def _count(self, job_id: int, futures: Sequence[Future[None]]) -> bool:
        errors = [e for future in futures if (e := future.exception()) is not None]
        for error in errors:
            logger.error("a page copy failed: %r", error)
        tally = self._report.failed if errors else self._report.done
        tally[job_id] = 1
        return not errors

    def _split(self, op: str, spans: Sequence[Span]) -> list[Future[None]]:
        parts = self._config.copy_threads
        groups = [spans[i::parts] for i in range(parts)]
        return [self._pool.submit(self._copy, op, group) for group in groups if group]

    def _copy(self, op: str, spans: Sequence[Span]) -> None:
        assert self._pages is not None
        if self._attached is None:
            raise ArenaError("the cache's memory is not mapped", op=op)
        start_s = time.perf_counter()
        getattr(self._pages, op)(self._attached.arena, spans)
        self._metrics.histogram(f"copy.{op}_seconds").observe(time.perf_counter() - start_s)
        copied = sum(len(span.block_ids) * self._block_bytes(span.group) for span in spans)
        self._metrics.counter(f"copy.{op}_bytes").inc(copied)

    def _block_bytes(self, group: int) -> int:
        return self._groups[group].layers * self._groups[group].page_bytes
