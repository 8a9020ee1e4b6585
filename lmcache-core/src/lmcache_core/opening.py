"""Opening an engine for real: arena, connectors found by their scheme, tiers.

The one place that knows both configuration and plugins; raises before anything is served.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from lmcache_core import plugins
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.engine import CacheEngine
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import logger
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import ConfigError, HostServices, Region, ReleaseToken, RemoteConnector
from lmcache_core.tiers.host import HostTier
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.transfer.executor import Runtime


def open_engine(
    config: EngineConfig,
    *,
    layout: ChunkLayout,
    namespace: Namespace | Callable[[], Namespace],
    runtime: Runtime | None = None,
) -> CacheEngine:
    """An engine with its arena and every configured tier.

    A ``namespace`` that takes time to know may be a function; it runs once the arena's
    memory is being prepared.

    Raises:
        ConfigError: no such backend, a wrong option, a directory that can't be written,
            a chunk larger than the host tier.
        BackendUnavailable: a store that can't be reached now.
    """
    runtime = runtime or Runtime()
    metrics = Metrics()
    slot_bytes = layout.payload_bytes + 8192
    if slot_bytes > config.host_bytes:
        raise ConfigError(
            f"one chunk of {config.chunk_size} tokens takes {slot_bytes} bytes, "
            f"the host tier has {config.host_bytes}",
            hint="give the host tier room for at least a few chunks",
        )
    arena = Arena.create(
        config.host_bytes,
        huge_pages=config.huge_pages,
        numa_node=None if config.numa_node < 0 else config.numa_node,
        prefault=config.prefault,
        warn=logger.warning,
    )
    engines: list[CacheEngine] = []
    services = _services(arena, runtime, metrics, lambda token: engines[0].released(token))
    connectors: list[tuple[str, TierConfig, RemoteConnector]] = []
    try:
        known = namespace if isinstance(namespace, Namespace) else namespace()
        for tier in config.tiers:
            name = _tier_name(tier, [n for n, _, _ in connectors])
            connectors.append((name, tier, plugins.open_connector(tier.url, services)))
    except BaseException:
        for _, _, connector in connectors:
            connector.close()
        arena.close()
        raise

    def open_tiers(host: HostTier) -> list[RemoteTier]:
        return [
            RemoteTier(
                name, connector, config=tier, host=host, layout=layout, runtime=runtime,
                metrics=metrics,
            )
            for name, tier, connector in connectors
        ]  # fmt: skip

    engine = CacheEngine(
        config=config,
        layout=layout,
        namespace=known,
        arena=arena,
        open_tiers=open_tiers,
        runtime=runtime,
        metrics=metrics,
    )
    engines.append(engine)
    for remote in engine.tiers.readable:
        remote.recover()
    return engine


def _tier_name(tier: TierConfig, taken: list[str]) -> str:
    scheme = tier.url.partition(":")[0]
    name = tier.name or ("disk" if scheme == "file" else scheme)
    if name in (*taken, "host"):
        raise ConfigError(
            f"two tiers are named {name!r}", hint="give one of them a name: {url: ..., name: ...}"
        )
    return name


def _services(
    arena: Arena, runtime: Runtime, metrics: Metrics, released: Callable[[ReleaseToken], None]
) -> HostServices:
    def nothing(callback: Callable[[Region], None]) -> None:
        """The arena is the only region, for the engine's whole life."""

    return HostServices(
        logger=logger,
        counter=metrics.counter,
        clock=runtime.now_s,
        tmp_dir=Path(tempfile.gettempdir()),
        regions=lambda: (arena.region,),
        on_region_added=nothing,
        on_region_removed=nothing,
        released=released,
    )
