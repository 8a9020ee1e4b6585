"""Chunks deleted on demand, exactly: what an engine has, what it is storing, and what its stores
still have of earlier processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lmcache_core.chunks import ChunkEngine
from lmcache_core.keys import STORED_KEY_BYTES, TAG_BYTES
from lmcache_core.tiers.remote import RemoteTier

STEP_KEYS = 1024
"""Handled in one turn, so that the engine is not held up."""
AT_ONCE = 4
"""Deletes of a tier on their way."""
TRIES = 3
"""Of one delete, while its tier can be used."""
MAX_SCANS = 1_000_000
"""Listings of one tier, so that a store which never says it is empty ends."""


class Clearing:
    """One order.  Owner thread only; starts when it is made, goes on with `step`.

    The chunks meant are those that are in a tier, or on the way there, when it is made.  A chunk
    that is stored again while it lasts may be deleted with them.

    Args:
        tiers: names; none means host and every tier below it.
        tags: of namespaces; None means every one.
        keys: these alone; None means all.

    Attributes:
        deleted: chunk copies that are gone.
        failed: reason -> chunk copies, or listings, that are not.
        cancelled: nothing more is begun.
    """

    def __init__(
        self,
        engine: ChunkEngine,
        *,
        tiers: Sequence[str] = (),
        tags: Sequence[bytes] | None = None,
        keys: Sequence[bytes] | None = None,
    ) -> None:
        self._engine = engine
        self._tags = None if tags is None else frozenset(tags)
        self._keys = None if keys is None else frozenset(keys)
        self._host = not tiers or "host" in tiers
        self.deleted = 0
        self.failed: dict[str, int] = {}
        self._known = 0
        self.cancelled = False
        below = [tier for tier in engine.tiers.readable if not tiers or tier.name in tiers]
        for tier in below:
            if tier.config.write == "never" and tiers:
                self._fail("read_only", 1)
        self._below = [_TierClearing(self, tier) for tier in below if tier.config.write != "never"]
        self._in_host: deque[bytes] = deque()
        if self._host:
            # What is being written would go on its way down once it is whole: now or never.
            keys = self._meant_in_host()
            self._known += len(keys)
            self._drop([key for key in keys if engine.host.get(key) is None])
            self._in_host.extend(key for key in keys if engine.host.get(key) is not None)
        self._unbar = engine.bar_writes(self.means)
        for each in self._below:
            each.start()
        self._check_end()

    @property
    def total(self) -> int:
        """Chunk copies that are known to be meant; grows while stores are listed."""
        return self._known

    @property
    def settled(self) -> int:
        """Those that are decided."""
        return self.deleted + sum(self.failed.values())

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._in_host and all(each.done for each in self._below)

    def cancel(self) -> None:
        """Start no more deletes."""
        self.cancelled = True
        self._fail("cancelled", len(self._in_host))
        self._in_host.clear()
        for each in self._below:
            each.cancel()

    def step(self) -> None:
        """Go on for a moment."""
        if self._in_host:
            several = [self._in_host.popleft() for _ in range(min(STEP_KEYS, len(self._in_host)))]
            self._drop(several)
        for each in self._below:
            each.step()
        self._check_end()

    def means(self, key: bytes) -> bool:
        """Whether ``key`` is to go."""
        if self._keys is not None and key not in self._keys:
            return False
        if len(key) != STORED_KEY_BYTES:
            return False  # of somebody else, in the same store
        return self._tags is None or key[:TAG_BYTES] in self._tags

    def prefixes(self) -> list[bytes]:
        """What stores are to list: all keys that may be meant; none when keys are given."""
        if self._keys is not None:
            return []
        return [b""] if self._tags is None else sorted(self._tags)

    def candidates(self) -> frozenset[bytes] | None:
        """The keys that are given."""
        return self._keys

    def found(self, count: int) -> None:
        """So many more are meant."""
        self._known += count

    def ended(self, tier: str, asked: Sequence[bytes], kept: Sequence[bytes]) -> None:
        """Deletes of ``tier`` have ended."""
        self.deleted += len(asked) - len(kept)
        self._fail("not_deleted", len(kept))
        gone = set(asked).difference(kept)
        self._engine.note_gone(tier, [key for key in asked if key in gone], "cleared")

    def listing_failed(self, tier: RemoteTier) -> None:
        """A store could not be listed: what it has of others is still there."""
        self._known += 1
        self._fail("not_listed", 1)

    def forget_fetched(self, tier: RemoteTier) -> None:
        """What came to host from ``tier`` while it was being cleared goes too."""
        if not self._host:
            return
        engine = self._engine

        def is_late(key: bytes) -> bool:
            chunk = engine.host.get(key)
            return engine.is_arriving(key) if chunk is None else chunk.origin == tier.name

        engine.host.drop([key for key in self._meant_in_host() if is_late(key)])

    def _meant_in_host(self) -> list[bytes]:
        host = self._engine.host
        if self._keys is not None:
            return [key for key in self._keys if key in host and self.means(key)]
        every = host.keys()
        return [key for key in every if self.means(key)]

    def _drop(self, keys: Sequence[bytes]) -> None:
        self.deleted += len(keys)
        self._engine.host.drop(keys)
        self._engine.note_gone("host", keys, "cleared")

    def _check_end(self) -> None:
        if self.done:
            self._unbar()
            self._unbar = lambda: None

    def _fail(self, reason: str, count: int) -> None:
        if count:
            self.failed[reason] = self.failed.get(reason, 0) + count


class _TierClearing:
    """One tier's part."""

    def __init__(self, order: Clearing, tier: RemoteTier) -> None:
        self._order = order
        self._tier = tier
        self._waiting: deque[bytes] = deque()
        self._prefixes: deque[bytes] = deque()
        self._asked: set[bytes] = set()
        self._tried: dict[bytes, int] = {}
        self._deleting = 0
        self._scanning = False
        self._scans = 0
        self.done = False

    def start(self) -> None:
        """Take back what is not yet on its way, and note what is there."""
        order, tier = self._order, self._tier
        tier.take_back(order.means)
        given = order.candidates()
        known = given if given is not None else tier.keys_of(b"")
        self._want([key for key in known if order.means(key)])
        if given is None:
            if tier.removals.can_scan:
                self._prefixes.extend(order.prefixes())
            elif tier.shared:
                order.listing_failed(tier)
        self.step()

    def cancel(self) -> None:
        """Start no more."""
        if self._waiting:
            self._order.ended(self._tier.name, list(self._waiting), list(self._waiting))
        self._waiting.clear()
        self._prefixes.clear()

    def step(self) -> None:
        """Start the next deletes, or list what else there is."""
        while self._waiting and self._deleting < AT_ONCE:
            batch = [
                self._waiting.popleft()
                for _ in range(min(self._tier.max_batch, len(self._waiting)))
            ]
            self._deleting += 1
            self._tier.delete(batch, self._deleted(batch))
        if self._waiting or self._deleting or self._scanning:
            return
        if self._prefixes:
            self._scan(self._prefixes[0])
        elif not self.done:
            self._order.forget_fetched(self._tier)
            self.done = True

    def _deleted(self, batch: Sequence[bytes]) -> Callable[[list[bytes]], None]:
        def ended(kept: list[bytes]) -> None:
            self._deleting -= 1
            again = {key for key in kept if self._may_try_again(key)}
            self._waiting.extend(key for key in kept if key in again)
            decided = [key for key in batch if key not in again]
            self._order.ended(self._tier.name, decided, [k for k in kept if k not in again])

        return ended

    def _may_try_again(self, key: bytes) -> bool:
        """Also a queue of ours that was full for a moment keeps a key from being deleted."""
        self._tried[key] = self._tried.get(key, 1) + 1
        return self._tried[key] <= TRIES and self._tier.available and not self._order.cancelled

    def _scan(self, prefix: bytes) -> None:
        self._scanning = True
        self._scans += 1

        def found(keys: list[bytes], whole: bool) -> None:
            self._scanning = False
            new = [key for key in keys if self._order.means(key) and key not in self._asked]
            self._want(new)
            if not whole and not new:
                # It gives nothing new, and does not say that this is all.
                self._order.listing_failed(self._tier)
            if (whole or not new or self._scans >= MAX_SCANS) and self._prefixes:
                self._prefixes.popleft()

        self._tier.removals.scan(prefix, found)

    def _want(self, keys: Sequence[bytes]) -> None:
        self._waiting.extend(keys)
        self._asked.update(keys)
        self._order.found(len(keys))
