"""Names in the store that nobody needs any more, and when they can go."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

from lmcache_backend_infinistore.wire import MAX_ITEMS, Item
from lmcache_core.sdk import Counter

_MOST = 4096


class Leftovers:
    """Two kinds; thread-safe, bounded.

    A payload that was replaced or deleted is dropped once no reader can hold its head any more; a
    forgotten one is the server's to evict.

    A put that broke off is dealt with before the next call: the server never evicts it, and dies
    when its name is read or deleted.  A head, which somebody may read, is overwritten and deleted
    at once.  A payload is overwritten, and deleted after the grace: a relay may still hand on what
    it has of the broken put, and a delete just after that would be the server's end.

    Args:
        grace_s: how long a reader may hold a head, and a relay a part of a put.
    """

    def __init__(
        self, *, grace_s: float, clock: Callable[[], float], counter: Callable[[str], Counter]
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._counter = counter
        self._lock = threading.Lock()
        self._later: deque[tuple[float, str]] = deque()
        self._broken: dict[str, float] = {}
        self._uncovered: dict[str, None] = {}
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

    def sweep(self, head: str) -> None:
        """The put of ``head`` broke off."""
        with self._lock:
            self._make_room()
            self._broken[head] = self._clock()

    def cover(self, payload: str) -> None:
        """The put of ``payload`` broke off."""
        with self._lock:
            self._make_room()
            self._uncovered[payload] = None

    @contextmanager
    def to_sweep(self, limit_s: float) -> Iterator[tuple[list[Item], list[Item]]]:
        """What to overwrite, and what to overwrite and delete, by the caller alone; forgotten when
        the block ends well.

        Raises:
            TimeoutError: another thread sweeps for ``limit_s``.
        """
        if not any(self._to_do()):
            yield [], []
            return
        if not self._sweeping.acquire(timeout=max(0.0, limit_s)):
            raise TimeoutError("another call still sweeps")
        try:
            covers, sweeps = self._to_do()
            yield _items(covers), _items(sweeps)
            with self._lock:
                for name in covers:
                    self._uncovered.pop(name, None)
                    self._broken[name] = self._clock() + self._grace_s
                for name, due_s in sweeps.items():
                    if self._broken.get(name) == due_s:  # else it broke off again
                        del self._broken[name]
            self._counter("leftovers_swept").inc(len(covers) + len(sweeps))
        finally:
            self._sweeping.release()

    def _to_do(self) -> tuple[list[str], dict[str, float]]:
        now_s = self._clock()
        with self._lock:
            due = ((name, due_s) for name, due_s in self._broken.items() if due_s <= now_s)
            return list(islice(self._uncovered, MAX_ITEMS)), dict(islice(due, MAX_ITEMS))

    def _make_room(self) -> None:
        for names in (self._uncovered, self._broken):
            if len(names) >= _MOST:
                names.pop(next(iter(names)))
                self._counter("leftovers_forgotten").inc()


def _items(names: Iterable[str]) -> list[Item]:
    return [Item(name.encode()) for name in names]
