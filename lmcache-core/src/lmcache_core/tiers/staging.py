"""Slots of the host tier's memory in which chunks lie encoded, on their way to a store."""

from __future__ import annotations

from lmcache_core.envelope import stored_bytes
from lmcache_core.tiers.host import HostChunk, HostTier


class Staging:
    """At most ``limit_bytes`` at a time and a quarter of the host tier, but always one slot.
    Owner thread only."""

    def __init__(self, host: HostTier, limit_bytes: int) -> None:
        self._host = host
        self._limit_bytes = min(limit_bytes, host.capacity_bytes // 4)
        self._used_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether slots are out, so that one may come back."""
        return self._used_bytes > 0

    def borrow(self, chunk: HostChunk) -> HostChunk | None:
        """A slot as large as that of ``chunk``; None when there is none now."""
        nbytes = stored_bytes(chunk.payload_bytes)
        if self._used_bytes and self._used_bytes + nbytes > self._limit_bytes:
            return None
        slot = self._host.borrow(chunk.key, chunk.parent, chunk.layout)
        if slot is not None:
            self._used_bytes += nbytes
        return slot

    def give_back(self, slot: HostChunk) -> None:
        """Nobody touches it any more."""
        self._used_bytes -= stored_bytes(slot.payload_bytes)
        self._host.abort(slot)

    def forget(self, slot: HostChunk) -> None:
        """The store may still read it: it is the engine's to lose."""
        self._used_bytes -= stored_bytes(slot.payload_bytes)
