"""What one engine counts: every survived failure has a name here.

Names are dotted (``"disk.corrupt"``); `lmcache_core.series` says how each is shown outside.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable
from typing import TypedDict

BUCKETS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of a histogram's buckets, in seconds; one more takes the rest."""

MAX_SAMPLES = 1024


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


class Histogram:
    """Seconds in fixed buckets (`BUCKETS_S`); thread-safe.  The latest single values are kept
    too, at most `MAX_SAMPLES`, for whoever has buckets of his own."""

    __slots__ = ("_lock", "_samples", "counts", "sum_s")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: deque[float] = deque(maxlen=MAX_SAMPLES)
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
            self.sum_s += seconds
            self._samples.append(seconds)

    def take_samples(self) -> list[float]:
        """The values since the last call."""
        with self._lock:
            samples = list(self._samples)
            self._samples.clear()
        return samples


class Recent(TypedDict):
    """What happened since some moment, as plain values ready to be sent; gauges are of now."""

    counters: dict[str, int]
    gauges: dict[str, float]
    samples: dict[str, list[float]]


class Metrics:
    """A registry by name; names are made on first use, thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str) -> Counter:
        """The counter of ``name``, such as ``"disk.corrupt"``."""
        with self._lock:
            return self._counters.setdefault(name, Counter())

    def histogram(self, name: str) -> Histogram:
        """The histogram of ``name``, such as ``"lookup_seconds"``."""
        with self._lock:
            return self._histograms.setdefault(name, Histogram())

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Have ``read`` say the value of ``name`` whenever it is asked for."""
        with self._lock:
            self._gauges[name] = read

    def snapshot(self) -> dict[str, int]:
        """Every counter's value now, by name, sorted."""
        with self._lock:
            return {name: c.value for name, c in sorted(self._counters.items())}

    def gauges(self) -> dict[str, float]:
        """Every gauge's value now, by name."""
        with self._lock:
            reads = list(self._gauges.items())
        return {name: float(read()) for name, read in reads}

    def histograms(self) -> dict[str, Histogram]:
        """Every histogram, by name."""
        with self._lock:
            return dict(self._histograms)


class Deltas:
    """What happened between two calls of `take`.  Not thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counters: dict[str, int] = {}
        self._gauges: dict[str, float] = {}

    def take(self) -> Recent:
        """Counters that moved since the last call, by how much, gauges that changed, and the
        values that histograms got."""
        counters, gauges = self._metrics.snapshot(), self._metrics.gauges()
        moved = {name: value - self._counters.get(name, 0) for name, value in counters.items()}
        changed = {name: v for name, v in gauges.items() if self._gauges.get(name) != v}
        samples = {name: h.take_samples() for name, h in self._metrics.histograms().items()}
        self._counters, self._gauges = counters, gauges
        return {
            "counters": {name: value for name, value in moved.items() if value},
            "gauges": changed,
            "samples": {name: values for name, values in samples.items() if values},
        }


def merge(first: Recent, second: Recent) -> Recent:
    """Both together; a gauge of the second wins."""
    counters, samples = dict(first["counters"]), dict(first["samples"])
    for name, value in second["counters"].items():
        counters[name] = counters.get(name, 0) + value
    for name, values in second["samples"].items():
        samples[name] = [*samples.get(name, ()), *values]
    return {
        "counters": counters,
        "gauges": {**first["gauges"], **second["gauges"]},
        "samples": samples,
    }
