"""Which encoding brings a prefix back soonest over a link of a given speed.  Pure.

After the adaptation of CacheGen (SIGCOMM'24, section 5.3), with two differences: the choice is
made when a chunk is stored, once, and keeping chunks as they are is one of the choices.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NEARLY = 1.1
"""An encoding of better quality is taken when it costs at most so much more time."""
_KEEP = 0.7  # weight of what was known before, against one new measurement


class Way(NamedTuple):
    """One encoding; ``Way("", "")`` keeps a chunk as it is."""

    codec: str
    level: str


AS_IS = Way("", "")


@dataclass(slots=True)
class _Known:
    """Of one way: stored bytes and seconds of decoding, for each byte of payload."""

    stored: float
    decode_s: float
    decoded: bool = False


class LinkMeter:
    """Bytes a second that a link gives while it is busy, over all calls at the same time; what
    is older than some ``horizon_s`` of busy time fades.  Thread-safe."""

    def __init__(self, *, min_bytes: int = 1 << 20, horizon_s: float = 10.0) -> None:
        self._min_bytes = min_bytes
        self._horizon_s = horizon_s
        self._active = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._bytes = 0.0
        self._known = False
        self._lock = threading.Lock()

    def begin(self, now_s: float) -> None:
        """A transfer starts."""
        with self._lock:
            self._account(now_s)
            self._active += 1

    def end(self, now_s: float, nbytes: int) -> None:
        """It has ended, and moved ``nbytes``."""
        with self._lock:
            self._account(now_s)
            self._active -= 1
            self._bytes += nbytes
            self._known = self._known or self._bytes >= self._min_bytes
            if self._busy_s > self._horizon_s:
                self._busy_s /= 2
                self._bytes /= 2

    @property
    def bytes_per_s(self) -> float | None:
        """None until ``min_bytes`` have moved."""
        with self._lock:
            if not self._known:
                return None
            return self._bytes / max(self._busy_s, 1e-9)

    def _account(self, now_s: float) -> None:
        if self._active:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s


class Chooser:
    """Learns what each way costs, and chooses.  Thread-safe.

    Args:
        ways: best quality first; the first is `AS_IS`.
        target_s: 0 chooses the fastest.
    """

    def __init__(self, ways: Sequence[Way], *, target_s: float = 0.0) -> None:
        self._ways = tuple(ways)
        self._target_s = target_s
        self._known = {AS_IS: _Known(1.0, 0.0, decoded=True)}
        self._lock = threading.Lock()

    def encoded(self, way: Way, raw_bytes: int, stored_bytes: int, seconds: float) -> None:
        """One payload was encoded.  Until one is decoded, that is taken to cost as much."""
        stored = stored_bytes / max(1, raw_bytes)
        per_byte_s = seconds / max(1, raw_bytes)
        with self._lock:
            known = self._known.get(way)
            if known is None:
                self._known[way] = _Known(stored, per_byte_s)
                return
            known.stored += (1 - _KEEP) * (stored - known.stored)
            if not known.decoded:
                known.decode_s += (1 - _KEEP) * (per_byte_s - known.decode_s)

    def decoded(self, way: Way, raw_bytes: int, seconds: float) -> None:
        """One payload was decoded."""
        per_byte_s = seconds / max(1, raw_bytes)
        with self._lock:
            known = self._known.get(way)
            if known is None or way == AS_IS:
                return
            if not known.decoded:
                known.decode_s, known.decoded = per_byte_s, True
            else:
                known.decode_s += (1 - _KEEP) * (per_byte_s - known.decode_s)

    def choose(self, link_bytes_per_s: float | None, prefix_bytes: int) -> Way:
        """For a link that gives so much, and a prefix of so many bytes of payload.

        Nothing is encoded before the link's speed is known; then each way is tried once.
        """
        if link_bytes_per_s is None:
            return AS_IS
        with self._lock:
            untried = [way for way in self._ways if way not in self._known]
            if untried:
                return untried[0]
            times = [self._seconds(way, link_bytes_per_s) for way in self._ways]
        if self._target_s:
            limit_s = self._target_s / max(1, prefix_bytes)
            met = [way for way, seconds in zip(self._ways, times) if seconds <= limit_s]
            if met:
                return met[0]
        best = min(times)
        return next(w for w, seconds in zip(self._ways, times) if seconds <= NEARLY * best)

    def _seconds(self, way: Way, link_bytes_per_s: float) -> float:
        """For each byte of payload.  The two are added, as for a prefix of one chunk: where they
        overlap, an encoding is better than its estimate."""
        known = self._known[way]
        return known.stored / link_bytes_per_s + known.decode_s
