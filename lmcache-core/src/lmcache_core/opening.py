"""Opening an engine for real: arena, connectors found by their scheme, tiers.

The one place that knows both configuration and plugins; raises before anything is served.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, TypeVar

from lmcache_core import plugins
from lmcache_core.agent.peers import FleetConnector
from lmcache_core.chunks import ChunkEngine
from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.engine import CacheEngine
from lmcache_core.envelope import stored_bytes
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import logger
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    ConfigError,
    HostServices,
    Region,
    ReleaseToken,
    RemoteConnector,
)
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.host import HostTier
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.tokens import read_token
from lmcache_core.transfer.executor import Runtime
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.peers import PeerConnector
from lmcache_core.transport.transport import Transport


def open_engine(
    config: EngineConfig,
    *,
    layout: ChunkLayout,
    namespace: Namespace,
    runtime: Runtime | None = None,
) -> CacheEngine:
    """An engine of one model, with its arena and every configured tier; see `open_chunks`."""

    def make(parts: EngineParts) -> CacheEngine:
        return CacheEngine(layout=layout, namespace=namespace, **parts)

    return _open(config, [layout], make, runtime, lambda: None)


def open_chunks(
    config: EngineConfig,
    *,
    layouts: Sequence[ChunkLayout] = (),
    runtime: Runtime | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    identity: Callable[[], Mapping[str, str]] = dict,
) -> ChunkEngine:
    """An engine of chunks of any layout, with its arena and every configured tier.

    Args:
        layouts: which the host tier must have room for.
        meanwhile: runs while the arena's memory is being prepared.
        identity: asked afterwards, with a channel: what the chunks are, by field; engines whose
            fields differ push nothing to each other.

    Raises:
        ConfigError: no such backend, a wrong option, a directory that can't be written,
            a chunk larger than the host tier.
        BackendUnavailable: a store that can't be reached now.
    """
    return _open(config, layouts, lambda parts: ChunkEngine(**parts), runtime, meanwhile, identity)


def instance_name(config: EngineConfig, *, node: bool = False) -> str:
    """Under which this process is known to controllers."""
    return config.instance or (socket.gethostname() + ("" if node else f":{os.getpid()}"))


def transport_of(engine: ChunkEngine) -> Transport | None:
    """What ``engine`` sends and takes over its channel; None without one."""
    return next((part for part in engine.parts if isinstance(part, Transport)), None)


class EngineParts(TypedDict):
    """What every kind of engine is made of."""

    config: EngineConfig
    arena: Arena
    open_tiers: Callable[[HostTier], Sequence[RemoteTier]]
    runtime: Runtime
    metrics: Metrics


_Engine = TypeVar("_Engine", bound=ChunkEngine)


def _open(
    config: EngineConfig,
    layouts: Sequence[ChunkLayout],
    make: Callable[[EngineParts], _Engine],
    runtime: Runtime | None,
    meanwhile: Callable[[], None],
    identity: Callable[[], Mapping[str, str]] = dict,
) -> _Engine:
    runtime = runtime or Runtime()
    metrics = Metrics()
    for layout in layouts:
        _check_room(config, layout)
    arena = Arena.create(
        config.host_bytes,
        huge_pages=config.huge_pages,
        numa_node=None if config.numa_node < 0 else config.numa_node,
        prefault=config.prefault,
        warn=logger.warning,
    )
    engines: list[ChunkEngine] = []
    services = _services(arena, runtime, metrics, lambda token: engines[0].released(token))
    connectors: list[tuple[str, TierConfig, Encoding, RemoteConnector]] = []
    codecs = Codecs()
    hub: Hub | None = None
    try:
        meanwhile()
        hub = _open_hub(config, arena, metrics, runtime, services.released)
        for tier in config.tiers:
            name = _tier_name(tier, [row[0] for row in connectors])
            encoding = Encoding(
                tier,
                codecs,
                count=partial(_count, metrics, name),
            )
            connector = plugins.open_connector(tier.url, services)
            connectors.append((name, tier, encoding, connector))
        if hub is not None:
            connectors += _peers(config, hub, codecs, metrics)
            if config.ask_directory:
                connectors.append(_fleet(config, hub, codecs, metrics))
    except BaseException:
        for *_, connector in connectors:
            connector.close()
        if hub is not None:
            hub.close()
        arena.close()
        raise

    def open_tiers(host: HostTier) -> list[RemoteTier]:
        return [
            RemoteTier(
                name,
                connector,
                config=tier,
                host=host,
                runtime=runtime,
                metrics=metrics,
                encoding=encoding,
            )
            for name, tier, encoding, connector in connectors
        ]

    engine = make(
        EngineParts(
            config=config, arena=arena, open_tiers=open_tiers, runtime=runtime, metrics=metrics
        )
    )
    engines.append(engine)
    if hub is not None:
        engine.parts.append(Transport(engine, hub, config, identity=identity()))
    for remote in engine.tiers.readable:
        remote.recover()
    return engine


def _open_hub(
    config: EngineConfig,
    arena: Arena,
    metrics: Metrics,
    runtime: Runtime,
    released: Callable[[ReleaseToken], None],
) -> Hub | None:
    if not config.channel:
        for name in ("peers", "ask_directory"):
            if getattr(config, name):
                raise ConfigError(f"{name} without a channel", hint="channel: tcp://127.0.0.1:0")
        return None
    if not config.channel_token_file:
        raise ConfigError(
            "a channel without channel_token_file",
            hint="lmc token FILE makes one; every engine gets the same",
        )
    hub = Hub(
        config.channel,
        secret=read_token(config.channel_token_file).encode(),
        region=arena.region,
        metrics=metrics,
        released=released,
        clock=runtime.now_s,
    )
    logger.info("transfer channel at %s", hub.address)
    return hub


def _peers(
    config: EngineConfig, hub: Hub, codecs: Codecs, metrics: Metrics
) -> list[tuple[str, TierConfig, Encoding, RemoteConnector]]:
    """A tier for each peer, so that one which stands still holds up no other."""
    found: list[tuple[str, TierConfig, Encoding, RemoteConnector]] = []
    batch = min(64, hub.channel.capabilities.max_pieces)
    for number, address in enumerate(config.peers, 1):
        tier = TierConfig(url=address, write="never", deadline_s=config.peer_deadline_s)
        name = f"peer{number}"
        encoding = Encoding(tier, codecs, count=partial(_count, metrics, name))
        found.append((name, tier, encoding, PeerConnector(hub, address, max_batch=batch)))
    return found


def _fleet(
    config: EngineConfig, hub: Hub, codecs: Codecs, metrics: Metrics
) -> tuple[str, TierConfig, Encoding, RemoteConnector]:
    """A tier of whatever peers the controllers name."""
    if not config.controllers or not config.controller_token_file:
        raise ConfigError(
            "ask_directory without controllers", hint="set controllers and controller_token_file"
        )
    batch = min(64, hub.channel.capabilities.max_pieces)
    connector = FleetConnector(
        instance_name(config),
        config.controllers,
        token=read_token(config.controller_token_file),
        ca_file=config.controller_ca_file,
        open_peer=partial(PeerConnector, hub, max_batch=batch),
        max_batch=batch,
    )
    tier = TierConfig(url="fleet://", write="never", deadline_s=config.peer_deadline_s)
    return "fleet", tier, Encoding(tier, codecs, count=partial(_count, metrics, "fleet")), connector


def _check_room(config: EngineConfig, layout: ChunkLayout) -> None:
    slot_bytes = stored_bytes(layout.payload_bytes) + 4096
    if slot_bytes > config.host_bytes:
        raise ConfigError(
            f"one chunk of {layout.chunk_size} tokens takes {slot_bytes} bytes, "
            f"the host tier has {config.host_bytes}",
            hint="give the host tier room for at least a few chunks",
        )


def _count(metrics: Metrics, tier: str, event: str, amount: int) -> None:
    metrics.counter(f"{tier}.{event}").inc(amount)


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
