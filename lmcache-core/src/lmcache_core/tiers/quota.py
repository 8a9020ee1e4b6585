"""What a tier holds and how much room it has: pure bookkeeping, no I/O.

A key counts from the moment its put starts until its delete is confirmed, so the sum never
understates what is on the store.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from lmcache_core.policy.lru import Lru


class Quota:
    """Sizes, recency and pending deletes of one tier.  Owner thread only.

    Args:
        limit_bytes: most bytes to hold; 0 is no limit.
        now_s: the engine's clock.

    Attributes:
        used_bytes: of every key that is or may be on the store.
    """

    def __init__(self, limit_bytes: int, now_s: Callable[[], float]) -> None:
        self.limit_bytes = limit_bytes
        self._now_s = now_s
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

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    @property
    def has_leaving(self) -> bool:
        """Whether deletes are pending."""
        return bool(self._leaving)

    def is_leaving(self, key: bytes) -> bool:
        """Whether a delete of ``key`` is pending."""
        return key in self._leaving

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
        self._sizes[key] = nbytes
        self._used_at_s[key] = used_at_s
        self.used_bytes += nbytes
        self._stamp_of[key] = next(self._stamps)
        self._lru.add(key, None)

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
            self._lru.add(key, parent)
            self._used_at_s[key] = self._now_s()

    def _resize(self, key: bytes, nbytes: int) -> None:
        change = nbytes - self._sizes.get(key, 0)
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
        candidates = self._lru.victims(lambda key: True)
        while surplus > 0 and (key := next(candidates, None)) is not None:
            surplus -= self._sizes[key]
            self._lru.remove(key)
            victims.append(key)
        candidates.close()
        return victims

    def delete_started(self, keys: Iterable[bytes]) -> None:
        """``keys`` are leaving; they count until that is confirmed."""
        for key in keys:
            self._lru.remove(key)
            if key in self._sizes and key not in self._leaving:
                self._leaving.add(key)
                self._leaving_bytes += self._sizes[key]

    def delete_ended(self, keys: Sequence[bytes], gone: Sequence[bytes]) -> None:
        """Of ``keys`` those in ``gone`` are off the store; the others stay, and count."""
        for key in keys:
            if key in self._leaving:
                self._leaving.remove(key)
                self._leaving_bytes -= self._sizes[key]
                self._lru.add(key, None)
        self.forget(gone)

    def forget(self, keys: Iterable[bytes]) -> None:
        """``keys`` are not on the store, unless a put or delete of them is under way."""
        for key in keys:
            if key not in self._leaving and key not in self._writing:
                self._lru.remove(key)
                self._stamp_of.pop(key, None)
                self._used_at_s.pop(key, None)
                self.used_bytes -= self._sizes.pop(key, 0)

    def stamp(self, key: bytes) -> int:
        """Which put of ``key`` counts now; 0 when it is not held."""
        return self._stamp_of.get(key, 0)

    def vanished(self, key: bytes, stamp: int) -> None:
        """The store said that it lacks ``key``, asked when its put was ``stamp``."""
        if stamp and self.stamp(key) == stamp:
            self.forget([key])

    def touch(self, key: bytes) -> None:
        """``key`` was used."""
        self._lru.touch([key])
        if key in self._sizes:
            self._used_at_s[key] = self._now_s()
