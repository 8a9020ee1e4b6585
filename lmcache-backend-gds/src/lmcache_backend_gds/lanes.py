"""`Lanes`: values of one call move at the same time, which is the depth of the device's queue."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from lmcache_core.sdk import Buffer, Workers

T = TypeVar("T")

WORTH_BYTES = 1 << 20
"""A call that moves less is not split: a thread costs more than it brings."""


class Lanes:
    """Thread-safe; threads are kept while idle.

    Args:
        depth: parts of one call at the same time.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._workers = Workers("gds-lane")

    def slices(self, buffers: Sequence[Buffer]) -> list[slice]:
        """Into which parts a call is split; one where it is not worth it."""
        count = len(buffers)
        worth = sum(each.nbytes for each in buffers) >= WORTH_BYTES
        parts = min(self._depth, count) if worth else 1
        bounds = [count * number // parts for number in range(parts + 1)]
        return [slice(start, end) for start, end in pairwise(bounds)]

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Every part at once, the first on the caller's thread; what each returned or raised.

        A part must end by itself: the caller waits for all.
        """
        found: list[T | Exception] = [RuntimeError("did not run")] * len(parts)
        running = [threading.Lock() for _ in parts]

        def run_one(number: int) -> None:
            try:
                found[number] = parts[number]()
            except Exception as error:  # handed to the caller
                found[number] = error
            running[number].release()

        for number, lock in enumerate(running):
            lock.acquire()
            if number:
                self._workers.start(lambda number=number: run_one(number))  # type: ignore[misc]
        run_one(0)
        for lock in running:
            lock.acquire()
        return found

    def close(self) -> None:
        """Let idle threads end."""
        self._workers.close()
