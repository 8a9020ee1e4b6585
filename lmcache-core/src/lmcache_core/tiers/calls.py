"""Calls of one connector: bounded queue, deadlines, breaker, probes.

The owner thread starts calls and gets every answer; the calls themselves run on the
executor's threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache_core.config import TierConfig
from lmcache_core.logs import EventLog
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    LMCacheError,
    OpContext,
    RemoteConnector,
    Status,
)
from lmcache_core.transfer.breaker import Breaker
from lmcache_core.transfer.executor import Lane, Runtime

OVERDUE_GRACE_S = 0.25
_TOLD_BY_STORE = {Status.OK, Status.MISS, Status.SIZE_MISMATCH, Status.CORRUPT, Status.REJECTED}

Count = Callable[[str, int], None]


@dataclass(slots=True)
class _Call:
    """One call, from its queueing until it has settled.  ``deadline_s`` is known once it
    has started: waiting for a thread of ours is no fault of the store."""

    deadline_s: float = math.inf
    overdue: bool = False


class Calls:
    """Owner thread only, except inside the jobs.

    Args:
        count: counts an event under the tier's name; thread-safe.
        log: says what opens and closes the breaker.
    """

    def __init__(
        self,
        name: str,
        connector: RemoteConnector,
        *,
        config: TierConfig,
        runtime: Runtime,
        count: Count,
        log: EventLog,
    ) -> None:
        self._name = name
        self._log = log
        self._connector = connector
        self._config = config
        self._runtime = runtime
        self._count = count
        threads = max(1, min(config.threads, connector.capabilities.max_concurrency))
        self._executor = runtime.executor(
            f"lmc-{name}", threads=threads, max_queued=config.max_queued
        )
        self._breaker = Breaker(failures_to_open=config.failures_to_open)
        self._open_calls: dict[int, _Call] = {}
        self._ids = itertools.count()
        self._closed = False

    @property
    def allowed(self) -> bool:
        """Whether the breaker lets requests pass."""
        return not self._breaker.is_open

    @property
    def refusal(self) -> str:
        """Why it does not; "" while it does."""
        return self._breaker.reason

    @property
    def in_time(self) -> bool:
        """Whether an answer is still to come that is not overdue."""
        return any(not call.overdue for call in self._open_calls.values())

    def start(
        self,
        op: str,
        lane: Lane,
        width: int,
        run: Callable[[OpContext], list[Status]],
        answered: Callable[[list[Status]], None],
        wanted: Callable[[], bool] = lambda: True,
        cancelled: Callable[[], None] = lambda: None,
        prepare: Callable[[], None] = lambda: None,
        finish: Callable[[list[Status], float], list[Status]] = lambda statuses, left_s: statuses,
    ) -> None:
        """Queue ``run``; ``answered`` gets ``width`` statuses in the owner thread, always,
        or ``cancelled`` is called instead when it was no longer ``wanted`` as its turn came.

        A load has its deadline from now on, since a request waits for it; a store from when
        ``run`` starts.  ``prepare`` before it and ``finish`` after it are our own work in the
        same thread: the store is judged by ``run`` alone.

        Args:
            finish: gets the store's answers and the seconds left until the deadline; gives the
                statuses that are answered.
        """
        call_id = next(self._ids)
        call = self._open_calls[call_id] = _Call()
        deadline_s = self._config.deadline_s
        latest_s = self._runtime.now_s() + deadline_s if lane is Lane.LOAD else math.inf

        def end(then: Callable[[], None]) -> None:
            def ended() -> None:
                del self._open_calls[call_id]
                then()

            self._runtime.completions.post(ended)

        def not_run(event: str, status: Status) -> None:
            self._count(f"{event}.{op}", width)
            answered([status] * width)

        def settle(told: list[Status], statuses: list[Status], error: LMCacheError | None) -> None:
            self._judge(op, told, error)
            for status in statuses:
                if status not in (Status.OK, Status.MISS):
                    self._count(f"{op}.{status.value}", 1)
            answered(statuses)

        def job() -> None:
            now_s = self._runtime.now_s()
            if not wanted():
                end(cancelled)
                return
            if now_s >= latest_s:
                end(lambda: not_run("dropped_late", Status.TIMED_OUT))
                return
            error: LMCacheError | None = None
            until_s = latest_s
            try:
                prepare()
                call.deadline_s = until_s = min(latest_s, self._runtime.now_s() + deadline_s)
                told = run(OpContext(deadline_s=until_s))
                if len(told) != width:
                    raise LMCacheError("an answer of the wrong length", op=op)
            except Exception as caught:  # the boundary to foreign code: counted, never lost
                error = caught if isinstance(caught, LMCacheError) else LMCacheError(repr(caught))
                told = [Status.FAILED] * width
            call.deadline_s = math.inf
            statuses = told
            if error is None:
                try:
                    statuses = finish(told, until_s - self._runtime.now_s())
                except Exception:  # ours, not the store's: what it gave is not used
                    self._count(f"finish_failed.{op}", 1)
                    statuses = [Status.FAILED if s is Status.OK else s for s in told]
            end(lambda: settle(told, statuses, error))

        if not self._executor.submit(job, lane):
            end(lambda: not_run("dropped_queue", Status.FAILED))

    def tick(self) -> None:
        """Notice overdue calls; called in every poll."""
        now_s = self._runtime.now_s()
        for call in self._open_calls.values():
            if not call.overdue and now_s > call.deadline_s + OVERDUE_GRACE_S:
                call.overdue = True
                self._count("overdue", 1)
                self._failed("a call is past its deadline", fatal=True)

    def close(self, timeout_s: float) -> bool:
        """Close executor and connector, each within its limit; False when a call still runs."""
        self._closed = True
        clean = self._executor.close(timeout_s)
        closed = self._runtime.bounded(self._close_connector, CLOSE_LIMIT_S)
        if not closed:
            self._count("close_overdue", 1)
        return clean and closed

    def _close_connector(self) -> None:
        try:
            self._connector.close()
        except Exception:  # a foreign close must not keep the engine from closing
            self._count("close_failed", 1)

    def _judge(self, op: str, statuses: Sequence[Status], error: LMCacheError | None) -> None:
        if error is not None:
            self._count(f"error.{type(error).__name__}", 1)
            fatal = isinstance(error, (BackendUnavailable, BackendClosed))
            self._failed(str(error), fatal=fatal)
        elif any(s in (Status.TIMED_OUT, Status.ABANDONED) for s in statuses):
            self._failed(f"{op} missed its deadline", fatal=True)
        elif any(s in _TOLD_BY_STORE for s in statuses):
            self._breaker.success()
        else:
            self._failed(f"{op} failed", fatal=False)

    def _failed(self, reason: str, *, fatal: bool) -> None:
        if self._breaker.failure(reason, fatal=fatal):
            self._count("breaker_opened", 1)
            self._log.warn("breaker_opened", tier=self._name, reason=repr(reason))
            self._start_probing()

    def _start_probing(self) -> None:
        """Ask for the store's health once an interval, off the request path, until it is well;
        also while no request comes that would poll the engine."""
        asking = well = False

        def job() -> None:
            nonlocal asking, well
            ctx = OpContext(deadline_s=self._runtime.now_s() + self._config.deadline_s)
            self._count("probes", 1)
            try:
                well = self._connector.health(ctx).ok
            except Exception:  # the boundary to foreign code
                self._count("probes_failed", 1)
            asking = False
            if well:
                self._runtime.completions.post(self._recovered)

        def fire() -> bool:
            nonlocal asking
            if self._closed or well:
                return False
            if not asking:
                asking = True
                if not self._executor.submit(job, Lane.LOAD):
                    asking = False
            return True

        self._runtime.every(self._config.probe_interval_s, fire)

    def _recovered(self) -> None:
        self._breaker.close()
        self._count("breaker_closed", 1)
        self._log.warn("breaker_closed", tier=self._name)
