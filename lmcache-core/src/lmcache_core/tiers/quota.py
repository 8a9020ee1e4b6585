"""What a tier holds and how much room it has: pure bookkeeping, no I/O.

A key counts from the moment its put starts until its delete is confirmed, so the sum never
understates what is on the store.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from lmcache_core.policy.lru import Lru
from lmcache_core.policy.shares import Shares


class Quota:
    """Sizes, recency and pending deletes of one tier.  Owner thread only.

    Args:
        limit_bytes: most bytes to hold; 0 is no limit.
        now_s: the engine's clock.
        gone: told each key that is no longer held.

    Attributes:
        used_bytes: of every key that is or may be on the store.
        shares: of namespaces in it.
    """

    def __init__(
        self,
        limit_bytes: int,
        now_s: Callable[[], float],
        gone: Callable[[bytes], None] = lambda key: None,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.shares = Shares()
        self._now_s = now_s
        self._gone = gone
        self._pins: dict[bytes, int] = {}
        self._used_at_s: dict[bytes, float] = {}
        self.used_bytes = 0
        self._sizes: dict[bytes, int] = {}
        self._lru = Lru()
        self._leaving: set[bytes] = set()
        self._leaving_bytes = 0
        self._writing: set[bytes] = set()
        self._before: dict[bytes, int] = {}
        self._stamps = itertools.count(1)
        self._stamp_of: dict[bytes, int] = {}
        self._unheld_deletes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    @property
    def has_leaving(self) -> bool:
        """Whether deletes are pending."""
        return bool(self._leaving)

    def is_leaving(self, key: bytes) -> bool:
        """Whether a delete of ``key`` is pending."""
        return key in self._leaving

    def is_writing(self, key: bytes) -> bool:
        """Whether a put of ``key`` is under way."""
        return key in self._writing

    @property
    def pinned_bytes(self) -> int:
        """Of keys that eviction leaves alone."""
        return sum(self._sizes.get(key, 0) for key in self._pins)

    def pin(self, key: bytes) -> None:
        """Leave ``key`` alone, held or not, until as many `unpin`."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: bytes) -> None:
        """End one `pin`; without one nothing happens."""
        left = self._pins.get(key, 0) - 1
        if left > 0:
            self._pins[key] = left
        else:
            self._pins.pop(key, None)

    def is_resident(self, key: bytes) -> bool:
        """Whether ``key`` is on the store for sure, as far as we know, and stays."""
        return key in self._used_at_s and key not in self._leaving

    def resident(self) -> list[bytes]:
        """Keys that are on the store for sure, as far as we know."""
        return [key for key in self._used_at_s if key not in self._leaving]

    def keys_of(self, tag: bytes, used_before_s: float = math.inf) -> list[bytes]:
        """Held keys that start with ``tag``, not used since ``used_before_s``."""
        used_at_s = self._used_at_s
        return [
            key
            for key in self._sizes
            if key.startswith(tag) and used_at_s.get(key, 0.0) < used_before_s
        ]

    def size(self, key: bytes) -> int:
        """Bytes that ``key`` counts; 0 when it is not held."""
        return self._sizes.get(key, 0)

    def fits(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be put now."""
        return not self.limit_bytes or self.used_bytes + nbytes <= self.limit_bytes

    def found(self, key: bytes, nbytes: int, used_at_s: float) -> None:
        """``key`` was on the store already; call in order of last use, oldest first."""
        self._resize(key, nbytes)
        self._used_at_s[key] = used_at_s
        self._stamp_of[key] = next(self._stamps)
        self._may_go(key, None)

    def put_started(self, key: bytes, nbytes: int) -> None:
        """Count at most ``nbytes``, beside those of a key that is held: for a moment both may be
        there."""
        if key in self._sizes:
            self._before[key] = self._sizes[key]
        self._resize(key, self._sizes.get(key, 0) + nbytes)
        self._stamp_of[key] = next(self._stamps)
        self._writing.add(key)

    def put_ended(self, key: bytes, parent: bytes | None, *, ok: bool, nbytes: int) -> None:
        """The put of ``nbytes`` has settled; one that is not OK is in doubt: what was there
        before, or what was put."""
        self._writing.discard(key)
        before = self._before.pop(key, 0)
        if key in self._sizes:
            self._resize(key, nbytes if ok else max(before, nbytes))
        if ok:
            self._may_go(key, parent)
            self._used_at_s[key] = self._now_s()

    def _resize(self, key: bytes, nbytes: int) -> None:
        change = nbytes - self._sizes.get(key, 0)
        self.shares.count(key, change, key not in self._sizes)
        self._sizes[key] = nbytes
        self.used_bytes += change
        if key in self._leaving:
            self._leaving_bytes += change

    def choose_victims(self, nbytes: int) -> list[bytes]:
        """Oldest keys whose deletes, with those pending, make room for ``nbytes``."""
        if not self.limit_bytes:
            return []
        surplus = self.used_bytes - self._leaving_bytes + nbytes - self.limit_bytes
        victims: list[bytes] = []
        candidates = self._lru.victims(self._evictable)
        while surplus > 0 and (key := next(candidates, None)) is not None:
            surplus -= self._sizes[key]
            self._may_not_go(key)
            victims.append(key)
        candidates.close()
        return victims

    def choose_over_share(self, most: int) -> list[bytes]:
        """Oldest keys of namespaces that have more than their share, at most ``most``."""
        victims: list[bytes] = []
        for tag in self.shares.take_over():
            leaving = sum(self._sizes[k] for k in self._leaving if k.startswith(tag))
            surplus = self.shares.surplus(tag) - leaving
            candidates = self.shares.victims(tag, self._evictable)
            while surplus > 0 and len(victims) < most:
                key = next(candidates, None)
                if key is None:
                    break
                surplus -= self._sizes[key]
                self._may_not_go(key)
                victims.append(key)
            candidates.close()
            if surplus > 0 and victims:
                self.shares.again(tag)
        return victims

    def limit_shares(self, limits: Mapping[bytes, int]) -> None:
        """See `Shares.limit`."""
        self.shares.limit(limits, lambda: ((key, None) for key in self._lru.resident()))

    def _evictable(self, key: bytes) -> bool:
        # One that is being rewritten would be there again after its delete.
        return key not in self._pins and key not in self._writing

    def _may_go(self, key: bytes, parent: bytes | None) -> None:
        self._lru.add(key, parent)
        self.shares.add(key, parent)

    def _may_not_go(self, key: bytes) -> None:
        self._lru.remove(key)
        self.shares.remove(key)

    def delete_started(self, keys: Iterable[bytes]) -> None:
        """``keys`` are leaving; they count until that is confirmed."""
        for key in keys:
            self._may_not_go(key)
            self._unheld_deletes += key not in self._sizes
            if key in self._sizes and key not in self._leaving:
                self._leaving.add(key)
                self._leaving_bytes += self._sizes[key]

    def delete_ended(self, keys: Sequence[bytes], gone: Sequence[bytes]) -> None:
        """Of ``keys`` those in ``gone`` are off the store; the others stay, and count."""
        for key in keys:
            if key in self._leaving:
                self._leaving.remove(key)
                self._leaving_bytes -= self._sizes[key]
                self._may_go(key, None)
        self.forget(gone)

    def forget(self, keys: Iterable[bytes]) -> None:
        """``keys`` are not on the store, unless a put or delete of them is under way."""
        for key in keys:
            if key not in self._leaving and key not in self._writing:
                self._may_not_go(key)
                self._stamp_of.pop(key, None)
                self._used_at_s.pop(key, None)
                nbytes = self._sizes.pop(key, None)
                if nbytes is not None:
                    self.used_bytes -= nbytes
                    self.shares.count(key, -nbytes, -1)
                    self._gone(key)

    def stamp(self, key: bytes) -> int:
        """Which put of ``key`` counts now; 0 or less when it is not held, and another such number
        once a key that is not held was deleted."""
        return self._stamp_of.get(key, -self._unheld_deletes)

    def vanished(self, key: bytes, stamp: int) -> None:
        """The store said that it lacks ``key``, asked when its put was ``stamp``."""
        if stamp > 0 and self.stamp(key) == stamp:
            self.forget([key])

    def touch(self, key: bytes) -> None:
        """``key`` was used."""
        self._lru.touch([key])
        self.shares.touch([key])
        if key in self._sizes:
            self._used_at_s[key] = self._now_s()
