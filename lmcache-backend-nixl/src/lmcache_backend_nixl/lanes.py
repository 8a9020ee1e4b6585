"""Lanes: what one call in flight needs for itself, made when first used and used again.

A call that is late keeps its lane until the library lets go of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Closing(Protocol):
    """What a lane must offer."""

    def close(self) -> None:
        """Give back what it holds."""
        ...


L = TypeVar("L", bound=Closing)


class Lanes(Generic[L]):
    """At most ``limit``; thread-safe.

    Args:
        make: a new one.
        limit: how many calls may be in flight.
    """

    def __init__(self, make: Callable[[], L], limit: int) -> None:
        self._make = make
        self._free = threading.BoundedSemaphore(limit)
        self._idle: list[L] = []
        self._closed = False
        self._lock = threading.Lock()

    def take(self, timeout_s: float) -> L | None:
        """A lane for the caller alone; None when all are in use for so long."""
        if not self._free.acquire(timeout=max(0.0, timeout_s)):
            return None
        with self._lock:
            if self._idle:
                return self._idle.pop()
        try:
            return self._make()
        except BaseException:
            self._free.release()
            raise

    def give(self, lane: L) -> None:
        """Back from its caller."""
        with self._lock:
            keep = not self._closed
            if keep:
                self._idle.append(lane)
        if not keep:
            lane.close()
        self._free.release()

    def close(self) -> None:
        """Close those that nobody uses; the others close when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()
