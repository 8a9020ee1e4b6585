"""Names in the store that nobody needs any more, and when they can go."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lmcache_backend_infinistore.wire import MAX_ITEMS, Item
from lmcache_core.sdk import Counter

_MOST = 4096


class Leftovers:
    """Two kinds; thread-safe, bounded.

    A payload that was replaced or deleted is dropped once no reader can hold its head any more; a
    forgotten one is the server's to evict.  A put that broke off is swept up before the next
    call: the server never evicts it, and dies when its name is read or deleted.

    Args:
        grace_s: how long a reader may hold a head.
    """

    def __init__(
        self, *, grace_s: float, clock: Callable[[], float], counter: Callable[[str], Counter]
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._counter = counter
        self._lock = threading.Lock()
        self._later: deque[tuple[float, str]] = deque()
        self._broken: dict[str, None] = {}
        self._sweeping = threading.Lock()

    def later(self, name: str) -> None:
        """Drop ``name`` after the grace."""
        with self._lock:
            if len(self._later) >= _MOST:
                self._later.popleft()
                self._counter("leftovers_forgotten").inc()
            self._later.append((self._clock() + self._grace_s, name))

    def due(self) -> list[Item]:
        """What can be dropped now, at most one message's worth."""
        found: list[Item] = []
        now_s = self._clock()
        with self._lock:
            while self._later and self._later[0][0] <= now_s and len(found) < MAX_ITEMS:
                found.append(Item(self._later.popleft()[1].encode()))
        return found

    def sweep(self, name: str) -> None:
        """The put of ``name`` broke off."""
        with self._lock:
            if len(self._broken) >= _MOST:
                del self._broken[next(iter(self._broken))]
                self._counter("leftovers_forgotten").inc()
            self._broken[name] = None

    @contextmanager
    def to_sweep(self, limit_s: float) -> Iterator[list[Item]]:
        """What to sweep, by the caller alone; forgotten when the block ends well.

        Raises:
            TimeoutError: another thread sweeps for ``limit_s``.
        """
        if not self._broken:
            yield []
            return
        if not self._sweeping.acquire(timeout=max(0.0, limit_s)):
            raise TimeoutError("another call still sweeps")
        try:
            with self._lock:
                names = list(self._broken)[:MAX_ITEMS]
            yield [Item(name.encode()) for name in names]
            with self._lock:
                for name in names:
                    self._broken.pop(name, None)
            self._counter("leftovers_swept").inc(len(names))
        finally:
            self._sweeping.release()
