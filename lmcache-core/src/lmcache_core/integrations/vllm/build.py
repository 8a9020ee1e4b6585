"""From vLLM's configuration to an engine: what is refused, sizes, identity, tiers."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lmcache_core.config import EngineConfig
from lmcache_core.engine import CacheEngine
from lmcache_core.integrations.vllm.identity import engine_namespace
from lmcache_core.integrations.vllm.scheduler import Scheduler
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import logger
from lmcache_core.opening import open_engine
from lmcache_core.sdk import ConfigError
from lmcache_core.settings import load_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


PREFAULT_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What both roles derive alike from the same configuration."""

    config: EngineConfig
    block_size: int
    layout: ChunkLayout


def plan_for(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Plan:
    """Settings and layout for this engine.

    Raises:
        ConfigError: see `refuse_unsupported`, and the configuration's own errors.
    """
    refuse_unsupported(vllm_config, kv_cache_config)
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    config = load_config(transfer.kv_connector_extra_config)
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    step = math.lcm(spec.block_size, kv_cache_config.cache_hit_alignment_tokens or 1)
    chunk_size = -(-config.chunk_size // step) * step
    if chunk_size != config.chunk_size:
        logger.warning(
            "chunk_size %d is not a multiple of the engine's hit alignment %d: using %d",
            config.chunk_size, step, chunk_size,
        )  # fmt: skip
        config = msgspec.structs.replace(config, chunk_size=chunk_size)
    payload = len(group.layer_names) * (chunk_size // spec.block_size) * spec.page_size_bytes
    description = f"{kv_cache_config.kv_cache_layout}/{spec!r}/{sorted(group.layer_names)}"
    layout = ChunkLayout(
        chunk_size=chunk_size, payload_bytes=payload, description=description.encode()
    )
    return Plan(config, spec.block_size, layout)


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse what can't be served exactly, with the reason.

    Raises:
        ConfigError: several KV cache groups, other than full attention, MLA, more than one
            worker, or a role other than ``kv_both``.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    reason = ""
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        reason = f"the model has {len(groups)} KV cache groups ({', '.join(kinds)})"
    elif isinstance(groups[0].kv_cache_spec, MLAAttentionSpec):
        reason = "the model uses multi-head latent attention (MLA)"
    elif type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        reason = f"the model's attention is {type(groups[0].kv_cache_spec).__name__}"
    elif getattr(groups[0].kv_cache_spec, "sliding_window", None):
        reason = "the model uses sliding-window attention"
    elif parallel.world_size > 1:
        reason = f"the engine has {parallel.world_size} workers"
    elif getattr(parallel, "decode_context_parallel_size", 1) > 1:
        reason = "decode context parallelism is on"
    elif transfer is not None and transfer.kv_role != "kv_both":
        reason = f"kv_role is {transfer.kv_role}"
    if reason:
        raise ConfigError(
            f"LMCacheCoreConnector can't cache this engine exactly: {reason}",
            hint="served are full-attention models with one worker and kv_role kv_both; "
            "remove --kv-transfer-config to run without the connector",
        )


def build_scheduler(
    plan: Plan, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> Scheduler:
    """The scheduler's half, with its engine open."""
    engine: CacheEngine = open_engine(
        plan.config,
        layout=plan.layout,
        # Hashed while the arena is being prefaulted.
        namespace=lambda: engine_namespace(vllm_config, kv_cache_config),
    )
    if plan.config.prefault:
        # Page faults in the first requests would cost more than they do now.
        engine.host.arena.wait_prefaulted(PREFAULT_LIMIT_S)
    logger.info(
        "KV cache: host %.1f GiB, chunks of %d tokens (%.1f MiB), tiers %s, pid %d",
        plan.config.host_bytes / (1 << 30),
        plan.config.chunk_size,
        plan.layout.payload_bytes / (1 << 20),
        [tier.name for tier in engine.tiers.readable],
        os.getpid(),
    )
    wanted = vllm_config.kv_events_config
    events = wanted is not None and wanted.enable_kv_cache_events
    return Scheduler(engine, block_size=plan.block_size, events=events)
