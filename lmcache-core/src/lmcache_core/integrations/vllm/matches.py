"""The longest prefix that a request can load, while it is being found and held."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_core.cache import Cache, Slot, Ticket
from lmcache_core.integrations.vllm.geometry import Geometry


class Match:
    """Chunks of a prefix from ``first`` on, pinned until `release`.  Owner thread only.

    With two kinds of chunks the first decides how far the prefix goes; then the window before
    its end must be there too, else a shorter prefix is tried.

    Args:
        keys: of the whole prefix, first kind.
        first: number of the first chunk that is asked for.
        computed: tokens that the device has already.

    Attributes:
        end: chunks of the prefix, once `done`.
        asked: chunks that were looked for.
    """

    def __init__(
        self,
        cache: Cache,
        geometry: Geometry,
        keys: Sequence[bytes],
        *,
        first: int,
        computed: int,
    ) -> None:
        self._cache = cache
        self._geometry = geometry
        self._keys = keys
        self._deadline_s = cache.now_s() + cache.config.lookup_deadline_s
        self._tail: Ticket | None = None
        self._tail_start = 0
        self._why = ""
        self._decided = False
        self.first = first
        self.computed = computed
        self.asked = len(keys)
        self.end = first
        self._full = self._start(keys[first:], 0, keys[first - 1] if first else None)

    @property
    def done(self) -> bool:
        """Whether `end` is final.  Never blocks; True once the deadline has passed."""
        if not self._decided:
            self._decided = self._decide()
        return self._decided

    @property
    def sources(self) -> dict[bytes, str]:
        """Key of the first kind -> tier that it was fetched from."""
        return self._full.sources

    @property
    def keys(self) -> list[bytes]:
        """Of every chunk that is pinned for the prefix, of each kind."""
        return [slot.key for number in (0, 1) for _, slot in self.slots(number)]

    def key(self, chunk: int) -> bytes:
        """Of the first kind."""
        return self._keys[chunk]

    def slots(self, kind: int) -> list[tuple[int, Slot]]:
        """Number and slot of each chunk of ``kind`` that the prefix needs."""
        if kind == 0:
            return list(enumerate(self._full.hits()[: self.end - self.first], self.first))
        if self._tail is None:
            return []
        return list(enumerate(self._tail.hits(), self._tail_start))

    def why_missed(self) -> str:
        """Why chunk number `end` is not here; "" when nobody knows it."""
        return self._why or self._cache.why_missed(self._full, self.end - self.first)

    def release(self) -> None:
        """Unpin everything, want no more."""
        self._decided = True
        self._cache.release(self._full)
        if self._tail is not None:
            self._cache.release(self._tail)

    def _start(self, keys: Sequence[bytes], kind: int, parent: bytes | None) -> Ticket:
        return self._cache.prefetch(keys, parent=parent, layout=kind, deadline_s=self._deadline_s)

    def _decide(self) -> bool:
        if self._tail is None:
            if not self._full.done:
                return False
            self.end = self.first + len(self._full.hits())
        while len(self._geometry.kinds) > 1 and self.end > self.first:
            if self._tail is None:
                self._tail = self._ask_window()
            if not self._tail.done:
                return False
            found = len(self._tail.hits())
            if found == len(self._tail.keys):
                return True
            # A prefix that ends before the gap may have its window.
            self._why = self._why or self._cache.why_missed(self._tail, found) or "window"
            self._cache.release(self._tail)
            self._tail = None
            self.end = max(self.first, self._tail_start + found)
        return True

    def _ask_window(self) -> Ticket:
        needed = self._geometry.tail_start(self.end)
        self._tail_start = max(needed, self.computed // self._geometry.chunk_size)
        keys = [self._geometry.key(key, 1) for key in self._keys[self._tail_start : self.end]]
        start = self._tail_start
        return self._start(keys, 1, self._geometry.key(self._keys[start - 1], 1) if start else None)
