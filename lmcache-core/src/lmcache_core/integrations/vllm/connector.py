"""`LMCacheCoreConnector`: vLLM 0.32's connector interface, as a thin facade.

vLLM makes one instance per role.  The scheduler's instance owns the cache engine and its
arena; each worker's instance maps that arena and copies pages.  Upstream interface:
``vllm/distributed/kv_transfer/kv_connector/v1/base.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from lmcache_core.integrations.vllm.build import Plan, build_scheduler, build_worker, plan_for
from lmcache_core.integrations.vllm.metadata import StepMetadata
from lmcache_core.integrations.vllm.scheduler import Scheduler
from lmcache_core.integrations.vllm.stats import PromMetrics, Stats
from lmcache_core.integrations.vllm.worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class LMCacheCoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefix chunks of KV from host memory and lower tiers, for vLLM.

    Raises:
        ConfigError: the configuration is wrong, or the model can't be served exactly.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        plan: Plan = plan_for(vllm_config, kv_cache_config)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = build_scheduler(plan, vllm_config, kv_cache_config)
        else:
            self._worker = build_worker(plan, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a request never waits for its stores."""
        return False

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler's half; only in that role."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> Worker:
        """The worker's half; only in that role."""
        assert self._worker is not None
        return self._worker

    # Scheduler side

    def on_new_request(self, request: Request) -> None:
        self.scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.update(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self.scheduler.finished(request)

    def has_pending_push_work(self) -> bool:
        return self.scheduler.has_pending_work()

    def reset_cache(self) -> bool:
        return self.scheduler.reset()

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        self.worker.handle_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker.start_loads(self._step().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads that the step waits for are whole before it starts."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Chunks are copied whole after the step, not by layer."""

    def wait_for_save(self) -> None:
        self.worker.start_stores(self._step().stores)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        finished = self.worker.finished_loads()
        return KVConnectorTransferResults(
            finished_recving=finished, failed_recving=self.worker.failed_loads()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self.worker.report()

    def take_events(self) -> Iterable[Any]:
        return self.scheduler.take_events()

    def get_kv_connector_stats(self) -> Stats | None:
        side = self._worker if self._scheduler is None else self._scheduler
        assert side is not None
        stats = Stats(side.stats())
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def _step(self) -> StepMetadata:
        meta = self._get_connector_metadata()
        assert isinstance(meta, StepMetadata)
        return meta
