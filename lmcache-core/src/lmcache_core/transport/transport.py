"""`Transport`: what one engine sends to and takes from others, over one channel."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.transport.hub import Hub
from lmcache_core.transport.lend import Lender
from lmcache_core.transport.push import Pusher
from lmcache_core.transport.receive import Receiver

EXECUTOR_TIMEOUT_S = 1.0
SETTLE_TIMEOUT_S = 1.5


class Transport:
    """Owner thread only, as the engine; `tick` with each of its polls.

    Attributes:
        address: where peers reach this engine.
        hub, receiver, pusher, lender: see there.
    """

    def __init__(
        self, engine: ChunkEngine, hub: Hub, config: EngineConfig, *, identity: Mapping[str, str]
    ) -> None:
        self._engine = engine
        self.hub = hub
        self.address = hub.address
        half = engine.host.capacity_bytes // 2
        # What is served to others waits for nothing of ours, and the other way round.
        self._ours = engine.runtime.executor(
            "lmc-transfer", threads=config.transfer_threads, max_queued=config.max_transfers * 64
        )
        self._theirs = engine.runtime.executor(
            "lmc-lend", threads=config.transfer_threads, max_queued=config.max_transfers
        )
        self.receiver = Receiver(
            engine,
            hub,
            self._ours,
            identity=identity,
            max_bytes=config.max_expected_bytes or half,
            start_timeout_s=config.transfer_start_s,
        )
        self.pusher = Pusher(
            engine, hub, self._ours, identity=identity, max_pushes=config.max_transfers
        )
        self.lender = Lender(
            engine,
            hub,
            self._theirs,
            lease_s=config.lend_lease_s,
            max_bytes=config.max_lent_bytes or half // 2,
        )

    @property
    def busy(self) -> bool:
        """Whether the owner must go on polling for transfers to end."""
        return self.receiver.busy or self.pusher.busy

    def tick(self) -> None:
        """Look at deadlines and at what has come to host."""
        self.receiver.tick()
        self.pusher.tick()
        self.lender.tick()

    def close(self) -> bool:
        """End every transfer and connection, before the engine's tiers are closed."""
        self.pusher.close()
        self.receiver.close()
        end_s = self._engine.now_s() + SETTLE_TIMEOUT_S
        while self.receiver.busy and self._engine.now_s() < end_s:
            self._engine.runtime.wait(0.01)
            self._engine.runtime.completions.drain()
        self.hub.close()
        return all([each.close(EXECUTOR_TIMEOUT_S) for each in (self._ours, self._theirs)])
