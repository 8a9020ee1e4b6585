"""Circuit breaker of one tier: a pure state machine over times that it is given."""

from __future__ import annotations


class Breaker:
    """Closed until ``failures_to_open`` failures in a row, or one fatal failure.

    While open nothing passes; the owner probes off the request path, and `close`s it when a
    probe succeeds.  Not thread-safe; ``is_open`` may be read from any thread.
    """

    def __init__(self, *, failures_to_open: int) -> None:
        self._failures_to_open = failures_to_open
        self._failures = 0
        self.is_open = False
        self.reason = ""

    def success(self) -> None:
        """A call was answered.  While open that closes nothing: it may be a late answer."""
        self._failures = 0

    def failure(self, reason: str, *, fatal: bool = False) -> bool:
        """A call failed; True when this opened the breaker."""
        self._failures += 1
        if self.is_open or not (fatal or self._failures >= self._failures_to_open):
            return False
        self.is_open = True
        self.reason = reason
        return True

    def close(self) -> None:
        """A probe succeeded."""
        self.is_open = False
        self.reason = ""
        self._failures = 0
