"""Circuit breaker of one tier: a pure state machine over times that it is given."""

from __future__ import annotations


class Breaker:
    """Closed until ``failures_to_open`` failures in a row, or one fatal failure.

    While open nothing passes but one probe per ``probe_interval_s``, which the owner runs
    off the request path; a probe that succeeds closes it.  Not thread-safe.
    """

    def __init__(self, *, failures_to_open: int, probe_interval_s: float) -> None:
        self._failures_to_open = failures_to_open
        self._probe_interval_s = probe_interval_s
        self._failures = 0
        self._next_probe_s = 0.0
        self._probing = False
        self.is_open = False
        self.reason = ""

    def success(self) -> None:
        """A call was answered.  While open, only `probed` closes."""
        self._failures = 0

    def failure(self, now_s: float, reason: str, *, fatal: bool = False) -> bool:
        """A call failed; True when this opened the breaker."""
        self._failures += 1
        if self.is_open or not (fatal or self._failures >= self._failures_to_open):
            return False
        self.is_open = True
        self.reason = reason
        self._next_probe_s = now_s + self._probe_interval_s
        return True

    def wants_probe(self, now_s: float) -> bool:
        """Whether a probe is due; True once, until `probed` is told its outcome."""
        if not self.is_open or self._probing or now_s < self._next_probe_s:
            return False
        self._probing = True
        return True

    def probed(self, now_s: float, *, ok: bool) -> None:
        """The outcome of the probe."""
        self._probing = False
        if ok:
            self.is_open = False
            self.reason = ""
            self._failures = 0
        else:
            self._next_probe_s = now_s + self._probe_interval_s
