"""The helpers of one connector: lent to one call each, started anew when one has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lmcache_backend_infinistore.supervisor import Helper
from lmcache_core.sdk import BackendClosed, BackendUnavailable

_FIRST_DELAY_S = 0.05
_FREE_STARTS = 3
"""Failures in a row before the next start is delayed."""
_PATIENCE_S = 0.1
"""A call waits for a start that is due so soon; else it is told at once."""
_STARTS_A_CALL = 2
"""Starts that may fail while one call waits."""


class Pool:
    """At most ``limit`` helpers; thread-safe.

    Starts run on a thread of their own.  A call waits for one by its deadline, but not when
    the last starts have failed and the next is not due yet.

    Args:
        start: gives a connected `Helper`; runs off the request path.
        limit: helpers at the same time.
        restart_max_s: longest delay between two starts while they fail.
        clock: of deadlines.
    """

    def __init__(
        self,
        start: Callable[[], Helper],
        *,
        limit: int,
        restart_max_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._start = start
        self._limit = limit
        self._restart_max_s = restart_max_s
        self._clock = clock
        self._changed = threading.Condition()
        self._idle: list[Helper] = []
        self._lent = 0
        self._starting = 0
        self._failures = self._failed_starts = 0
        self._not_before_s = 0.0
        self._error = ""
        self._closed = False

    def take(self, deadline_s: float) -> Helper:
        """A helper of the caller's own until `give_back`.

        Raises:
            TimeoutError: none was free by ``deadline_s``.
            BackendUnavailable: none can be started now.
            BackendClosed: after `close`.
        """
        with self._changed:
            enough = self._failed_starts + _STARTS_A_CALL
            while True:
                if self._closed:
                    raise closed_error()
                while self._idle:
                    helper = self._idle.pop()
                    if helper.usable():
                        self._lent += 1
                        return helper
                    helper.end(kill=True)
                self._start_one()
                now_s = self._clock()
                left_s = deadline_s - now_s
                if left_s <= 0:
                    raise TimeoutError("no helper was free before the deadline")
                if not (self._lent or self._starting):
                    due_s = self._not_before_s - now_s
                    if due_s > _PATIENCE_S or self._failed_starts >= enough:
                        raise BackendUnavailable(
                            self._error,
                            backend="infinistore",
                            hint="is the server running, and reachable from here?",
                        )
                    left_s = min(left_s, max(0.0, due_s))
                self._changed.wait(left_s)

    def give_back(self, helper: Helper, *, well: bool, reason: str = "") -> None:
        """End the loan; one that is not ``well`` is ended, and another started."""
        with self._changed:
            self._lent -= 1
            if well:
                self._failures = 0
            else:
                self._failed(reason)
            keep = well and not self._closed
            if keep:
                self._idle.append(helper)
            elif not self._closed:
                self._start_one()
            self._changed.notify_all()
        if not keep:
            helper.end(kill=not well)

    def close(self) -> None:
        """End those that are idle; one that is lent ends when it comes back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for helper in idle:
            helper.end()

    def adopt(self, helper: Helper) -> None:
        """Take over one that was started elsewhere."""
        with self._changed:
            self._idle.append(helper)

    def _start_one(self) -> None:
        """Start another if there may be one; with the lock held."""
        count = len(self._idle) + self._lent + self._starting
        if self._starting or count >= self._limit or self._clock() < self._not_before_s:
            return
        self._starting += 1
        threading.Thread(target=self._run_start, name="infinistore-start", daemon=True).start()

    def _run_start(self) -> None:
        helper, reason = None, ""
        try:
            helper = self._start()
        except Exception as error:  # the next call says it
            reason = str(error) or type(error).__name__
        with self._changed:
            self._starting -= 1
            kept = helper is not None and not self._closed
            if kept and helper is not None:
                self._idle.append(helper)
            elif helper is None:
                self._failed_starts += 1
                self._failed(reason)
            self._changed.notify_all()
        if helper is not None and not kept:
            helper.end()

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._error = reason
        delays = self._failures - _FREE_STARTS
        if delays >= 0:
            delay_s = min(self._restart_max_s, _FIRST_DELAY_S * 2 ** min(delays, 16))
            self._not_before_s = self._clock() + delay_s


def closed_error() -> BackendClosed:
    """What a call after close raises."""
    return BackendClosed("the connector is closed", backend="infinistore")
