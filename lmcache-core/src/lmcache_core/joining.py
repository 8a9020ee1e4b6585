"""An engine that joins its controllers: the agent, and what it needs of everything else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

from lmcache_core import plugins
from lmcache_core.agent.agent import About, Agent
from lmcache_core.cache import Cache
from lmcache_core.chunks import ChunkEngine
from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.metrics import Metrics
from lmcache_core.opening import transport_of
from lmcache_core.sdk import ConfigError
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.remote import RemoteTier
from lmcache_core.tokens import read_token
from lmcache_core.transport.peers import PeerConnector
from lmcache_core.url import redact

LOCK_WAIT_S = 0.05
COPY_TIER = "copy"
"""Name, in metrics, of the tier that reads another engine for a copy."""


def join_engine(
    engine: ChunkEngine,
    about: Callable[[], About],
    *,
    turn: Callable[[], None] | None = None,
) -> Agent | None:
    """The agent of ``engine``, not started; None without controllers.  It closes with the engine.

    Args:
        about: what the engine is, but its tiers and its channel.
        turn: gets the owner to poll the engine; without it the agent's thread polls, when nobody
            else holds ``engine.owner``.

    Raises:
        ConfigError: a controller's URL, a token or certificate file is wrong.
    """
    config = engine.config
    if not config.controllers:
        return None

    def poll() -> None:
        # Whoever holds it is polling: not waited for long, so that closing is never held up.
        if engine.owner.acquire(timeout=LOCK_WAIT_S):
            try:
                engine.poll()
            finally:
                engine.owner.release()

    transport = transport_of(engine)
    complete = replace(
        about(),
        channel=transport.address if transport is not None else "",
        backends=_backends(config),
        urls={tier.name: redact(tier.config.url) for tier in engine.tiers.readable},
    )
    agent = _agent(
        engine,
        complete,
        config,
        engine.metrics,
        turn=turn or poll,
        owner=engine.owner,
        open_peer=partial(_open_peer, engine),
        max_pinned_bytes=config.max_pinned_bytes or engine.host.capacity_bytes // 2,
    )
    engine.parts.append(agent)
    return agent


def join_client(about: About, config: EngineConfig, cache: Cache) -> Agent | None:
    """The agent, not started, of an engine whose chunks a node server has; None without
    controllers.  The caller closes it.

    Raises:
        ConfigError: see `join_engine`.
    """
    if not config.controllers:
        return None
    return _agent(
        None,
        about,
        config,
        cache.metrics,
        turn=lambda: None,
        owner=cache.owner,
        open_peer=_no_peer,
        max_pinned_bytes=0,
    )


def _agent(
    engine: ChunkEngine | None,
    about: About,
    config: EngineConfig,
    metrics: Metrics,
    *,
    turn: Callable[[], None],
    owner: AbstractContextManager[object],
    open_peer: Callable[[str], RemoteTier],
    max_pinned_bytes: int,
) -> Agent:
    if not config.controller_token_file:
        raise ConfigError(
            "controllers without controller_token_file",
            hint="give the file that lmc controller made, or a copy of it",
        )
    return Agent(
        engine,
        about,
        controllers=config.controllers,
        token=read_token(config.controller_token_file),
        ca_file=config.controller_ca_file,
        metrics=metrics,
        turn=turn,
        owner=owner,
        open_peer=open_peer,
        max_pinned_bytes=max_pinned_bytes,
        sync_s=config.controller_sync_s,
    )


def _open_peer(engine: ChunkEngine, address: str) -> RemoteTier:
    """A tier that reads the host tier of the engine whose channel is at ``address``."""
    transport = transport_of(engine)
    if transport is None:
        raise ConfigError("this instance has no channel", hint="set channel and channel_token_file")
    tier = TierConfig(url=address, write="never", deadline_s=engine.config.peer_deadline_s)
    metrics = engine.metrics

    def count(event: str, amount: int) -> None:
        metrics.counter(f"{COPY_TIER}.{event}").inc(amount)

    batch = min(64, transport.hub.channel.capabilities.max_pieces)
    return RemoteTier(
        COPY_TIER,
        PeerConnector(transport.hub, address, max_batch=batch),
        config=tier,
        host=engine.host,
        runtime=engine.runtime,
        metrics=metrics,
        encoding=Encoding(tier, Codecs(), count=count),
    )


def _no_peer(address: str) -> RemoteTier:
    raise ConfigError("an engine at a node server has no chunks of its own")


def _backends(config: EngineConfig) -> dict[str, str]:
    """Distribution -> version of every backend in use."""
    refs = plugins.installed()
    used = [refs.get(tier.url.partition(":")[0]) for tier in config.tiers]
    return {ref.distribution: ref.version for ref in used if ref is not None}
