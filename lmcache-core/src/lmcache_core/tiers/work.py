"""`TierWork`: what the reads and the writes of one tier both work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcache_core.config import TierConfig
from lmcache_core.logs import EventLog
from lmcache_core.sdk import RemoteConnector
from lmcache_core.tiers.calls import Calls
from lmcache_core.tiers.encoding import Encoding
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.quota import Quota
from lmcache_core.transfer.executor import Runtime


class Tier(Protocol):
    """What they need of the tier that they belong to."""

    name: str
    config: TierConfig
    connector: RemoteConnector
    on_lost: Callable[[HostChunk], None]

    @property
    def available(self) -> bool:
        """Whether the store may be used now."""
        ...

    @property
    def max_batch(self) -> int:
        """Most keys in one call."""
        ...

    def count(self, event: str, amount: int = 1) -> None:
        """Count under the tier's name."""
        ...

    def stored(self, key: bytes) -> None:
        """``key`` is there now."""
        ...

    def delete(self, keys: Sequence[bytes]) -> None:
        """Have ``keys`` deleted."""
        ...

    def put_ended(self, keys: Sequence[bytes], doubtful: Sequence[bytes]) -> None:
        """Puts of ``keys`` have ended; ``doubtful`` may be there or not."""
        ...

    def make_room(self, nbytes: int) -> None:
        """Have older chunks deleted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Of one tier."""

    tier: Tier
    host: HostTier
    runtime: Runtime
    calls: Calls
    quota: Quota
    encoding: Encoding
    log: EventLog


class TierWork:
    """Of one tier.  Owner thread only, except inside its own jobs."""

    def __init__(self, parts: Parts) -> None:
        self._tier = parts.tier
        self._host = parts.host
        self._runtime = parts.runtime
        self._calls = parts.calls
        self._quota = parts.quota
        self._encoding = parts.encoding
        self._log = parts.log
