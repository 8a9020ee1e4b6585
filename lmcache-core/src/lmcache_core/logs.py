"""The project's logger; the application decides what becomes of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger("lmcache_core")


class EventLog:
    """``event key=value ...`` lines, at most one an interval and event; thread-safe enough:
    two threads may both log at the edge of an interval.

    What was held back is told with the next line (``suppressed=N``).
    """

    def __init__(
        self,
        now_s: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 10.0,
        target: logging.Logger = logger,
    ) -> None:
        self._now_s = now_s
        self._interval_s = interval_s
        self._target = target
        self._next_s: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def warn(self, event: str, **fields: object) -> None:
        """Log ``event`` as a warning, unless it was logged within the interval."""
        now_s = self._now_s()
        if now_s < self._next_s.get(event, 0.0):
            self._held[event] = self._held.get(event, 0) + 1
            return
        self._next_s[event] = now_s + self._interval_s
        held = self._held.pop(event, 0)
        if held:
            fields["suppressed"] = held
        self._target.warning("%s %s", event, " ".join(f"{k}={v}" for k, v in fields.items()))
