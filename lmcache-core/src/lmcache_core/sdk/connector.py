"""`RemoteConnector`: a backend's open data path, and its optional protocols."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from lmcache_core.sdk.buffers import Buffer, Region
from lmcache_core.sdk.capabilities import Capabilities
from lmcache_core.sdk.status import GetResult, Status

MAX_KEY_BYTES = 64
"""A key has 1 to so many bytes."""
CLOSE_LIMIT_S = 5.0
"""`RemoteConnector.close` returns within this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpContext:
    """What travels with a call.  New things go in here, so signatures never change.

    Attributes:
        deadline_s: absolute, on the clock of `time.monotonic`.
        request_id: for the log; "" when no request is behind the call.
    """

    deadline_s: float
    request_id: str = ""

    def remaining_s(self, now_s: float | None = None) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self.deadline_s - (time.monotonic() if now_s is None else now_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Answer of `RemoteConnector.health`.  Sizes in bytes, -1 when not reported."""

    ok: bool
    reason: str = ""
    used_bytes: int = -1
    total_bytes: int = -1
    details: dict[str, str] = field(default_factory=dict)


class RemoteConnector(ABC):
    """Blocking, batched, thread-safe up to ``capabilities.max_concurrency``.

    Rules that hold for every method (the conformance suite checks each):

    - Keys are immutable identities of 1 to 64 opaque bytes, without duplicates in one put.
    - Results have the length and the order of ``keys``.
    - ``ctx.deadline_s`` never raises: unfinished keys are TIMED_OUT (or ABANDONED).
    - A key is absent or gives the whole bytes of one put.  After TIMED_OUT, ABANDONED or
      FAILED of a put or delete, or an exception, it is old, new or absent, always whole.
    - When the call returns, its buffers are core's again, except those ABANDONED.
    - Over ``max_batch``, or overlapping targets: `ContractViolation`, nothing touched.
    - After `close`, or in a forked child: `BackendClosed`.

    Attributes:
        capabilities: constant after open.
    """

    capabilities: Capabilities

    @abstractmethod
    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        """OK or MISS for each key.  A hint: a later get may miss all the same."""

    @abstractmethod
    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        """Write each value to the start of its target.

        A larger target is fine.  A target's bytes are undefined unless OK; bytes outside
        of it are never touched.
        """

    @abstractmethod
    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        """Store all bytes of each source, which is read-only."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        """Remove each key.  An absent key is OK; another's lease is REJECTED."""

    @abstractmethod
    def health(self, ctx: OpContext) -> Health:
        """A cheap round trip that proves the store answers."""

    @abstractmethod
    def close(self) -> None:
        """Release everything, within `CLOSE_LIMIT_S` seconds.  Idempotent.

        Calls in flight end by their deadline.
        """


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """One stored value: its key, its size in bytes and when it was last written or read
    (seconds since the epoch; 0.0 when the store does not know)."""

    key: bytes
    nbytes: int
    used_at_s: float = 0.0


@runtime_checkable
class SupportsScan(Protocol):
    """Claimed by ``capabilities.scan``: the store can list what it holds."""

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every whole value whose key starts with ``prefix``, in any order.

        Values put or deleted during the scan may or may not appear.
        """
        ...


@runtime_checkable
class SupportsRegions(Protocol):
    """Claimed by ``capabilities.regions``: memory can be registered once."""

    def register_region(self, region: Region) -> None:
        """Make buffers of ``region`` usable without a registration a call."""
        ...

    def unregister_region(self, region: Region) -> None:
        """Forget ``region``; core has no buffer of it in flight."""
        ...


@runtime_checkable
class SupportsLeases(Protocol):
    """Claimed by ``capabilities.leases``: a value can be protected for a time."""

    def lease(self, keys: Sequence[bytes], ttl_s: float, ctx: OpContext) -> list[Status]:
        """Keep each key from eviction for ``ttl_s`` seconds."""
        ...

    def release(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        """End our own lease of each key."""
        ...


@runtime_checkable
class SupportsSubmit(Protocol):
    """Claimed by ``capabilities.submit``: transfers can be started and polled."""

    def submit_get(self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext) -> int:
        """Start a get; returns a ticket for `poll`."""
        ...

    def poll(self, ticket: int) -> list[GetResult] | None:
        """The results once all keys are decided, else None."""
        ...


OPTIONAL_PROTOCOLS: dict[str, type] = {
    "scan": SupportsScan,
    "regions": SupportsRegions,
    "leases": SupportsLeases,
    "submit": SupportsSubmit,
}
"""Capability flag -> the protocol that it claims; checked at open."""
