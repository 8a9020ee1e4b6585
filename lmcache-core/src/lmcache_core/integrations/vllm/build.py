"""From vLLM's configuration to the two halves: what is refused, sizes, identity, tiers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from lmcache_core.agent.agent import About, Agent
from lmcache_core.agent.wire import Kind
from lmcache_core.cache import Cache, EmbeddedCache
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.axes import page_axes
from lmcache_core.integrations.vllm.disaggregation import Disaggregation
from lmcache_core.integrations.vllm.geometry import Geometry, Group
from lmcache_core.integrations.vllm.identity import engine_namespace
from lmcache_core.integrations.vllm.model import served_model, tokenizer_of
from lmcache_core.integrations.vllm.scheduler import Scheduler
from lmcache_core.integrations.vllm.worker import Worker
from lmcache_core.joining import join_client, join_engine
from lmcache_core.keys import Namespace
from lmcache_core.logs import logger
from lmcache_core.opening import instance_name, open_chunks, transport_of
from lmcache_core.sdk import ConfigError
from lmcache_core.settings import load_config
from lmcache_core.tracing import make_tracer
from lmcache_core.transport.transport import Transport

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


PREFAULT_LIMIT_S = 60.0
ROLES = ("kv_both", "kv_producer", "kv_consumer")


@dataclass(frozen=True, slots=True)
class Plan:
    """What both roles derive alike from the same configuration."""

    config: EngineConfig
    geometry: Geometry


def plan_for(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Plan:
    """Settings and geometry for this engine.

    Raises:
        ConfigError: see `refuse_unsupported`, and the configuration's own errors.
    """
    refuse_unsupported(vllm_config, kv_cache_config)
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    parallel = vllm_config.parallel_config
    config = of_rank(load_config(transfer.kv_connector_extra_config), parallel.data_parallel_index)
    if transfer.kv_role != "kv_both" and not config.channel:
        raise ConfigError(
            f"kv_role is {transfer.kv_role}, but the engine has no channel",
            hint="give channel: tcp://127.0.0.1:7001 and channel_token_file, or kv_role kv_both",
        )
    if config.channel and config.node:
        raise ConfigError(
            "a channel needs the cache in the engine's own process, and node names another",
            hint="remove node, or channel",
        )
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    step = math.lcm(
        *(spec.block_size for spec in specs), kv_cache_config.cache_hit_alignment_tokens or 1
    )
    chunk_size = -(-config.chunk_size // step) * step
    if chunk_size != config.chunk_size:
        logger.warning(
            "chunk_size %d is not a multiple of the engine's hit alignment %d: using %d",
            config.chunk_size, step, chunk_size,
        )  # fmt: skip
        config = msgspec.structs.replace(config, chunk_size=chunk_size)
    stages = parallel.pipeline_parallel_size
    layers = _stage_layers(vllm_config) if stages > 1 else []
    groups = [
        Group.of(
            index=index,
            layers=max([len(group.layer_names), *layers]),
            block_size=group.kv_cache_spec.block_size,
            page_bytes=group.kv_cache_spec.page_size_bytes,
            window=_window(group.kv_cache_spec),
            chunk_size=chunk_size,
            axes=page_axes(group.kv_cache_spec, kv_cache_config.kv_cache_layout),
        )
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
    ]
    geometry = Geometry.of(
        groups,
        chunk_size=chunk_size,
        hit_step=step,
        parts=parallel.world_size // kv_cache_config.kv_tp_replicas,
        workers=parallel.world_size,
        padded=len(set(layers)) > 1,
        decode_only=_decode_only(vllm_config),
        description=_page_description(kv_cache_config),
    )
    return Plan(config, geometry)


def of_rank(config: EngineConfig, rank: int) -> EngineConfig:
    """``config`` for one data-parallel rank, since all get the same: rank 0 keeps its channel's
    port and its name, rank N has the port that is N higher, as vLLM's own connectors count, and a
    name that ends in ``:dpN``."""
    if not rank:
        return config
    changed: dict[str, str] = {}
    if config.instance:
        changed["instance"] = f"{config.instance}:dp{rank}"
    address, mark, options = config.channel.partition("?")
    host, _, port = address.rstrip("/").rpartition(":")
    if port.isascii() and port.isdigit() and int(port):
        changed["channel"] = f"{host}:{int(port) + rank}{mark}{options}"
    return msgspec.structs.replace(config, **changed)


def refuse_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse what can't be served exactly, with the reason.

    Raises:
        ConfigError: a kind of attention state other than full, sliding-window and MLA,
            context parallelism, an encoder, draft layers, or an unknown role.
    """
    reason = _why_not(vllm_config, kv_cache_config)
    if reason:
        raise ConfigError(
            f"LMCacheCoreConnector can't cache this engine exactly: {reason}",
            hint="served are decoders with full, sliding-window or MLA attention and kv_role "
            "kv_both, kv_producer or kv_consumer; remove --kv-transfer-config to run without it",
        )


def _why_not(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    served = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec)
    groups, parallel = kv_cache_config.kv_cache_groups, vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    others = sorted(
        {type(g.kv_cache_spec).__name__ for g in groups if type(g.kv_cache_spec) not in served}
    )
    if not groups:
        return "the model has no KV cache"
    if others:
        return f"the model keeps state of the kind {', '.join(others)}"
    if len(kv_cache_config.prefix_cacheable_group_ids) < len(groups):
        return "the model has groups of layers whose pages can't be found again by their prefix"
    if any(getattr(g.kv_cache_spec, "attention_chunk_size", None) for g in groups):
        return "the model uses chunked local attention"
    if any(group.is_eagle_group for group in groups):
        return "the engine speculates with draft layers of its own (EAGLE, MTP)"
    if vllm_config.model_config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}"
    if parallel.pipeline_parallel_size > 1 and len(groups) > 1:
        return "the model mixes kinds of attention over pipeline stages"
    if getattr(parallel, "nnodes_within_dp", 1) > 1:
        return f"its workers are spread over {parallel.nnodes_within_dp} hosts"
    if transfer is not None and transfer.kv_role not in ROLES:
        return f"kv_role is {transfer.kv_role}"
    return ""


def build_scheduler(
    plan: Plan, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> Scheduler:
    """The scheduler's half, with its cache open."""
    layouts = [kind.layout for kind in plan.geometry.kinds]
    found: list[Namespace] = []

    def identify() -> None:
        found.append(engine_namespace(vllm_config, kv_cache_config))

    def identity() -> dict[str, str]:
        return {
            "chunk_size": str(plan.config.chunk_size),
            "parts (TP and PP ranks whose bytes differ)": str(plan.geometry.parts),
            "pages": ",".join(layout.fingerprint.hex()[:12] for layout in layouts),
            "hash_algorithm": plan.config.hash_algorithm,
            "model, weights and engine": found[0].tag.hex(),
        }

    schedulers: list[Scheduler] = []

    def about(kind: Kind, node: Callable[[], str] = lambda: "") -> About:
        return About(
            name=instance_name(plan.config),
            kind=kind,
            node=node,
            models=(served_model(vllm_config, plan.config, plan.geometry, found[0]),),
            tokenize=tokenizer_of(vllm_config),
            explain=lambda request_id: schedulers[0].explain(request_id),
        )

    cache: Cache
    agent: Agent | None
    transport: Transport | None = None
    if plan.config.node:
        from lmcache_core.node.client import connect

        identify()
        node = connect(plan.config, layouts)
        cache = node
        agent = join_client(about("engine", lambda: node.incarnation), plan.config, node)
    else:
        # The weights are hashed while the arena is being prefaulted.
        engine = open_chunks(plan.config, layouts=layouts, meanwhile=identify, identity=identity)
        transport = transport_of(engine)
        agent = join_engine(engine, lambda: about("embedded"))
        if plan.config.prefault:
            # Page faults in the first requests would cost more than they do now.
            engine.host.arena.wait_prefaulted(PREFAULT_LIMIT_S)
        cache = EmbeddedCache(engine, layouts)
    _say_what_is_open(plan, cache.capacity_bytes, vllm_config.parallel_config.data_parallel_index)
    wanted = vllm_config.kv_events_config
    events = wanted is not None and wanted.enable_kv_cache_events
    assert vllm_config.kv_transfer_config is not None
    role = vllm_config.kv_transfer_config.kv_role
    disaggregation = Disaggregation(
        cache,
        transport,
        plan.geometry,
        may_prefill=role != "kv_consumer",
        may_decode=role != "kv_producer",
    )
    scheduler = Scheduler(
        cache,
        namespace=found[0],
        geometry=plan.geometry,
        events=events,
        disaggregation=disaggregation,
        agent=agent,
        tracer=make_tracer(plan.config.tracing),
    )
    schedulers.append(scheduler)
    return scheduler


def _say_what_is_open(plan: Plan, capacity_bytes: int, rank: int) -> None:
    logger.info(
        "KV cache: host %.1f GiB, chunks of %d tokens (%.1f MiB), %s, pid %d",
        capacity_bytes / (1 << 30),
        plan.config.chunk_size,
        plan.geometry.slot_bytes / (1 << 20),
        plan.config.node or [tier.url.partition(":")[0] for tier in plan.config.tiers],
        os.getpid(),
    )
    if rank == 1 and not plan.config.node:
        logger.warning(
            "each data-parallel rank holds a host tier of its own, and as much of every file tier "
            "as one may have: start `lmc serve`, and give `node`, for one cache of all ranks"
        )


def build_worker(plan: Plan, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Worker:
    """A worker's half."""
    by_index = {group.index: group for group in plan.geometry.groups}
    named: list[tuple[Group, Sequence[str]]] = [
        (by_index[index], tuple(group.layer_names))
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
    ]
    return Worker(
        plan.config,
        named,
        rank=_rank(vllm_config),
        workers=plan.geometry.workers,
        parts=plan.geometry.parts,
    )


def _rank(vllm_config: VllmConfig) -> int:
    """Of this worker among those of one engine: pipeline stage first, then tensor rank."""
    if vllm_config.parallel_config.world_size == 1:
        return 0
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tensor: Any = get_tp_group()
    return int(get_pp_group().rank_in_group * tensor.world_size + tensor.rank_in_group)


def _window(spec: Any) -> int | None:
    """Tokens before a position that must be there to compute it; see vLLM's
    ``SlidingWindowManager.get_num_skipped_tokens``."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    if not isinstance(spec, SlidingWindowSpec):
        return None
    return int(spec.sliding_window - 1 + spec.extra_retained_tokens)


def _decode_only(vllm_config: VllmConfig) -> bool:
    """Whether the backend ignores cached tokens when it prefills: vLLM's reference MLA on CPUs
    without AMX, for which it turns chunked prefill off."""
    chunked = vllm_config.scheduler_config.enable_chunked_prefill
    return bool(vllm_config.model_config.use_mla and not chunked)


def _stage_layers(vllm_config: VllmConfig) -> list[int]:
    """Layers of each pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    total = vllm_config.model_config.get_total_num_hidden_layers()
    stages = vllm_config.parallel_config.pipeline_parallel_size
    ranges = [get_pp_indices(total, stage, stages) for stage in range(stages)]
    return [end - start for start, end in ranges]


def _page_description(kv_cache_config: KVCacheConfig) -> bytes:
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return f"{kv_cache_config.kv_cache_layout}/{specs!r}".encode()
