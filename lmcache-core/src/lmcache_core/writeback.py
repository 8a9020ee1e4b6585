"""Tiers with ``write: on_evict``: chunks are written there before the host tier evicts them.

The oldest chunks are written ahead of time, so that eviction itself waits for nothing: so much of
the host tier as is asked for is free, or written below.  Who is oldest goes by the second chance
(F. J. Corbato, A Paging Experiment with the Multics System, 1968): a chunk that was used since it
was last looked at goes to the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from lmcache_core.envelope import stored_bytes
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier

AT_ONCE = 64
"""Writes on their way; each pins its chunk."""
LOOKS = 1024
"""In one turn, so that a step is not held up."""


class Engine(Protocol):
    """What it needs of the engine that it belongs to."""

    host: HostTier

    def demote(
        self, chunk: HostChunk, tier: RemoteTier, ended: Callable[[], None] = lambda: None
    ) -> None:
        """Write ``chunk`` to ``tier``; ``ended`` when that is over, however it went."""
        ...

    def on_residency(self, changed: Callable[[str, bytes, bool], None]) -> None:
        """Have ``changed`` told what comes and goes."""
        ...


class WriteBack:
    """Owner thread only.

    A chunk is offered once while it is in host: one that a tier did not take, or has evicted since,
    is not offered again.

    Args:
        tiers: that are written on eviction.
        ahead_bytes: of host memory that are kept free, or offered to the tiers.
    """

    def __init__(self, engine: Engine, tiers: Sequence[RemoteTier], *, ahead_bytes: int) -> None:
        self._engine = engine
        self._host = engine.host
        self._tiers = list(tiers)
        self._ahead_bytes = ahead_bytes
        self._unwritten: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._unwritten_bytes = 0
        self._new: list[bytes] = []
        self._offered: dict[bytes, int] = {}
        self._offered_bytes = 0
        self._moving = 0
        self._ending = False
        self._barred: list[Callable[[bytes], bool]] = []
        engine.on_residency(self._changed)

    def __contains__(self, key: bytes) -> bool:
        """Whether ``key`` is in host and was not offered yet."""
        return key in self._unwritten

    def __len__(self) -> int:
        """Chunks in host that were not offered yet."""
        return len(self._unwritten)

    @property
    def left(self) -> int:
        """Chunks that are to be offered whatever comes: none before `write_all`."""
        return len(self._unwritten) if self._ending else 0

    @property
    def left_bytes(self) -> int:
        """Host memory of these."""
        return self._unwritten_bytes if self._ending else 0

    def write_all(self) -> None:
        """Offer everything, by the ticks that follow: the engine closes."""
        self._ending = True

    def bar(self, meant: Callable[[bytes], bool]) -> Callable[[], None]:
        """Offer nothing that is ``meant``, until what is returned is called."""
        self._barred.append(meant)
        return lambda: self._barred.remove(meant)

    def tick(self) -> None:
        """Start the writes that are due."""
        # Only now: storing a prefix also uses it.
        for key in self._new:
            if key in self._unwritten:
                self._unwritten[key] = self._host.last_use(key), self._unwritten[key][1]
        self._new.clear()
        started = False
        for _ in range(min(LOOKS, len(self._unwritten))):
            if not self._unwritten or self._moving >= AT_ONCE or not self._is_due():
                break
            key, (seen, nbytes) = next(iter(self._unwritten.items()))
            used = self._host.last_use(key)
            barred = any(meant(key) for meant in self._barred)
            if self._ending and barred:
                del self._unwritten[key]
                self._unwritten_bytes -= nbytes
            elif barred or (used != seen and not self._ending):
                self._unwritten[key] = used, nbytes
                self._unwritten.move_to_end(key)
            else:
                started |= self._offer(key)
        if started:
            for tier in self._tiers:
                tier.start_stores()

    def _is_due(self) -> bool:
        free_bytes = self._host.capacity_bytes - self._host.used_bytes
        return self._ending or free_bytes + self._offered_bytes < self._ahead_bytes

    def _offer(self, key: bytes) -> bool:
        """Whether some tier lacks the chunk."""
        chunk = self._host.get(key)
        assert chunk is not None, "what leaves host leaves the list"
        _, nbytes = self._unwritten.pop(key)
        self._unwritten_bytes -= nbytes
        self._offered[key] = nbytes
        self._offered_bytes += nbytes
        lacking = [tier for tier in self._tiers if not tier.holds(key)]
        self._moving += len(lacking)
        for tier in lacking:
            self._engine.demote(chunk, tier, self._ended)
        return bool(lacking)

    def _ended(self) -> None:
        self._moving -= 1

    def _changed(self, tier: str, key: bytes, present: bool) -> None:
        if tier != self._host.name:
            return
        if present:
            chunk = self._host.get(key)
            assert chunk is not None
            nbytes = stored_bytes(chunk.payload_bytes)
            self._unwritten[key] = 0, nbytes
            self._unwritten_bytes += nbytes
            self._new.append(key)
        elif key in self._unwritten:
            self._unwritten_bytes -= self._unwritten.pop(key)[1]
        else:
            self._offered_bytes -= self._offered.pop(key, 0)
