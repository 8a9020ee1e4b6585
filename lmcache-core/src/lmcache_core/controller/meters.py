"""Rates and history, from what instances count."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from lmcache_core.controller import messages
from lmcache_core.series import series_of

WINDOW_S = 60.0
MAX_SAMPLES = 360
_MIN_GAP_S = 0.5
_ERRORS = frozenset({
    "lmcache_core:chunk_failures", "lmcache_core:host_full", "lmcache_core:tier_failures",
    "lmcache_core:tier_corrupt", "lmcache_core:tier_events",
})  # fmt: skip


class Totals(NamedTuple):
    """Tokens asked for, found and stored, and bytes read from and written to tiers below host."""

    requested: int = 0
    hit: int = 0
    stored: int = 0
    read: int = 0
    written: int = 0

    @classmethod
    def of(cls, counters: Mapping[str, int], tiers: Sequence[str]) -> Totals:
        """From an instance's counters; ``tiers`` are those below host."""
        hits = sum(n for name, n in counters.items() if name.startswith("vllm.hit_tokens."))
        return cls(
            counters.get("vllm.requested_tokens", 0),
            hits,
            counters.get("vllm.stored_tokens", 0),
            sum(counters.get(f"{tier}.read_bytes", 0) for tier in tiers),
            sum(counters.get(f"{tier}.stored_bytes", 0) for tier in tiers),
        )

    def since(self, before: Totals) -> Totals:
        """How much more this is."""
        return Totals(*(now - then for now, then in zip(self, before)))

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(*(one + two for one, two in zip(self, other)))


class Meter:
    """Rates of one process of an instance."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, Totals]] = deque(maxlen=int(WINDOW_S / _MIN_GAP_S) + 2)
        self._last: Totals | None = None

    def feed(self, now_s: float, totals: Totals) -> Totals:
        """Take in what it counts now; how much more that is than it told before."""
        before, self._last = self._last, totals
        grown = Totals() if before is None else totals.since(before)
        if min(grown) < 0:  # counters never fall: these are another's, or wrong
            self._points.clear()
            grown = Totals()
        if not self._points or now_s - self._points[-1][0] >= _MIN_GAP_S:
            self._points.append((now_s, totals))
        while len(self._points) > 2 and now_s - self._points[1][0] >= WINDOW_S:
            self._points.popleft()
        return grown

    def rates(self, now_s: float) -> messages.Rates:
        """Of the last minute, or since its first word."""
        if not self._points or self._last is None:
            return messages.Rates()
        start_s, first = self._points[0]
        seconds = max(now_s - start_s, 1.0)
        grown = self._last.since(first)
        return messages.Rates(
            requested_tokens=grown.requested / seconds,
            hit_tokens=grown.hit / seconds,
            stored_tokens=grown.stored / seconds,
            read_bytes=grown.read / seconds,
            write_bytes=grown.written / seconds,
        )


class History:
    """The fleet's last `MAX_SAMPLES` intervals."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._samples: deque[messages.Sample] = deque(maxlen=MAX_SAMPLES)
        self._before = Totals()

    def sample(self, at_s: float, totals: Totals) -> None:
        """End an interval.

        Args:
            at_s: Unix time.
            totals: of all instances; never fall.
        """
        grown, self._before = totals.since(self._before), totals
        seconds = self.interval_s
        self._samples.append(
            messages.Sample(
                at_s=at_s,
                hit_rate=min(grown.hit / grown.requested, 1.0) if grown.requested else None,
                requested_tokens=grown.requested / seconds,
                hit_tokens=grown.hit / seconds,
                stored_tokens=grown.stored / seconds,
                read_bytes=grown.read / seconds,
                write_bytes=grown.written / seconds,
            )
        )

    def shown(self) -> messages.History:
        """As the API has it."""
        return messages.History(interval_s=self.interval_s, samples=list(self._samples))


def errors_of(counters: Mapping[str, int]) -> dict[str, int]:
    """Those of an instance's counters that count failures, at most 64."""
    found = {name: count for name, count in sorted(counters.items()) if count and _is_error(name)}
    return dict(list(found.items())[:64])


@lru_cache(maxsize=4096)
def _is_error(name: str) -> bool:
    return series_of(name)[0].name in _ERRORS and not name.endswith(".probes")
