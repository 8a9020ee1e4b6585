"""Counters of one engine: every survived failure has a name here."""

from __future__ import annotations

import threading


class Counter:
    """A monotonic number; `inc` is thread-safe."""

    __slots__ = ("_lock", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Add ``amount``."""
        with self._lock:
            self.value += amount


class Metrics:
    """A registry of counters by name; names are made on first use, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, Counter] = {}

    def counter(self, name: str) -> Counter:
        """The counter of ``name``, such as ``"disk.corrupt"``."""
        with self._lock:
            return self._counters.setdefault(name, Counter())

    def snapshot(self) -> dict[str, int]:
        """Every counter's value now, by name, sorted."""
        with self._lock:
            return {name: c.value for name, c in sorted(self._counters.items())}
