"""Chunks of one tier stored in another form: compressed, or as they are.

Each is read, verified and decoded into host memory of its own, and put over itself: a store has
it in one form or the other at every moment, whenever the process ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lmcache_core.layout import ChunkLayout
from lmcache_core.policy.codec_choice import Way
from lmcache_core.sdk import Status
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.remote import RemoteTier

AT_ONCE = 2
"""Chunks on their way at the same time; each holds host memory."""


class Recode:
    """One order.  Owner thread only; started when it is made, and carried on by the engine's
    ``poll``.

    Args:
        way: the form that is wanted.
        lose: takes a slot that native code may still touch.

    Attributes:
        total: chunks that were named.
        recoded, unchanged, absent: those now in the form, those that had it already, and those
            that the tier lacks.
        failed: reason -> chunks; these are as they were.
        before_bytes, after_bytes: on the store, of the recoded chunks.
    """

    def __init__(
        self,
        keys: Sequence[bytes],
        tier: RemoteTier,
        host: HostTier,
        *,
        layout: ChunkLayout,
        way: Way,
        lose: Callable[[HostChunk, RemoteTier], None],
    ) -> None:
        self._tier = tier
        self._host = host
        self._layout = layout
        self._way = way
        self._lose = lose
        self._waiting = deque(dict.fromkeys(keys))
        self._active = 0
        self.total = len(self._waiting)
        self.recoded = self.unchanged = self.absent = 0
        self.failed: dict[str, int] = {}
        self.before_bytes = self.after_bytes = 0
        self._go_on()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting and not self._active

    @property
    def settled(self) -> int:
        """Chunks that are decided, of ``total``."""
        return self.recoded + self.unchanged + self.absent + sum(self.failed.values())

    def cancel(self) -> None:
        """Start no more; those on their way end.  The rest counts as failed, ``cancelled``."""
        self._fail("cancelled", len(self._waiting))
        self._waiting.clear()

    def _go_on(self) -> None:
        while self._waiting and self._active < AT_ONCE:
            key = self._waiting.popleft()
            chunk = self._host.borrow(key, None, self._layout)
            if chunk is None:
                self._fail("no_room")
                continue
            self._active += 1
            self._read(chunk)

    def _read(self, chunk: HostChunk) -> None:
        def fetched(status: Status | None, why: str) -> None:
            if status is Status.ABANDONED:
                self._lose(chunk, self._tier)
                self._ended("abandoned")
            elif status is Status.MISS and not why:
                self.absent += 1
                self._end(chunk)
            elif status is not Status.OK:
                self._end(chunk, why or (status.value if status else "cancelled"))
            elif chunk.codec == self._way.codec:
                self.unchanged += 1
                self._end(chunk)
            else:
                self._tier.rewrite(chunk, self._way, lambda told: self._written(chunk, told))

        self._tier.fetch(chunk, fetched)

    def _written(self, chunk: HostChunk, status: Status) -> None:
        if status is Status.ABANDONED:
            self._lose(chunk, self._tier)
            self._ended("abandoned")
        elif status is Status.MISS:
            self.absent += 1
            self._end(chunk)
        elif status is not Status.OK:
            self._end(chunk, status.value)
        else:
            self.recoded += 1
            self.before_bytes += chunk.read_bytes
            self.after_bytes += self._tier.stored_size(chunk.key)
            self._end(chunk)

    def _end(self, chunk: HostChunk, reason: str = "") -> None:
        self._host.abort(chunk)
        self._ended(reason)

    def _ended(self, reason: str) -> None:
        if reason:
            self._fail(reason)
        self._active -= 1
        self._go_on()

    def _fail(self, reason: str, count: int = 1) -> None:
        if count:
            self.failed[reason] = self.failed.get(reason, 0) + count
