"""`Workers`: blocking work off the caller's thread, which waits for it until a deadline only.

Work that is late runs on: whoever lent it memory is told when it has ended.  How much may be late
is bounded; past that the backend is unavailable.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lmcache_core.sdk.errors import BackendUnavailable

T = TypeVar("T")


class LeftBehind(Exception):
    """Raised by `Workers.run`: the work still runs, and may still touch what it was given."""


class Workers:
    """Daemon threads that are kept while idle; thread-safe.

    Args:
        name: of the backend.
        max_stuck: late pieces of work before `BackendUnavailable`.
    """

    def __init__(self, name: str, *, max_stuck: int = 8) -> None:
        self._name = name
        self._max_stuck = max_stuck
        self._stuck = 0
        self._idle: list[_Worker] = []
        self._closed = False
        self._lock = threading.Lock()

    @property
    def stuck_calls(self) -> int:
        """Pieces of work that are late and still run."""
        return self._stuck

    def run(self, work: Callable[[], T], timeout_s: float, ended_late: Callable[[], None]) -> T:
        """``work`` on a worker; what it returns or raises.

        Args:
            ended_late: called by the worker, once, when ``work`` ends after `LeftBehind`; here
                goes `HostServices.released` of every buffer that was answered ABANDONED.

        Raises:
            LeftBehind: not done within ``timeout_s``.
            BackendUnavailable: ``max_stuck`` pieces of work are late already.
        """
        outcome: _Outcome[T] = _Outcome()

        def job() -> None:
            try:
                outcome.value = work()
            except Exception as error:  # raised again in the caller
                outcome.error = error
            if outcome.end():
                self.came_back()
                ended_late()

        self.start(job)
        if not outcome.done.acquire(timeout=max(0.0, timeout_s)) and outcome.leave():
            self.left_behind()
            raise LeftBehind(f"no answer within {timeout_s:.3f} s")
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]

    def start(self, work: Callable[[], None]) -> None:
        """Hand ``work`` to an idle worker, or a new one; it must not raise.

        Raises:
            BackendUnavailable: see `run`.
        """
        with self._lock:
            if self._stuck >= self._max_stuck:
                raise BackendUnavailable(
                    f"{self._stuck} calls hang",
                    backend=self._name,
                    hint="the store or device stands still; look at it first",
                )
            worker = self._idle.pop() if self._idle else None
        (worker or _Worker(self._name, self._keep)).work.put(work)

    def left_behind(self) -> None:
        """Count work as late, for callers of `start` that wait for themselves."""
        with self._lock:
            self._stuck += 1

    def came_back(self) -> None:
        """Undo `left_behind`: it has ended."""
        with self._lock:
            self._stuck -= 1

    def close(self) -> None:
        """Let idle workers end; one that works ends when its work does."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def _keep(self, worker: _Worker) -> bool:
        """Keep an idle worker; False when it should end."""
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
            return not self._closed


class _Outcome(Generic[T]):
    """Of one piece of work: either it ends first, or its caller leaves first."""

    __slots__ = ("_ended", "_left", "_lock", "done", "error", "value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = self._left = False
        # A bare lock costs a tenth of an Event.
        self.done = threading.Lock()
        self.done.acquire()
        self.value: T | None = None
        self.error: Exception | None = None

    def end(self) -> bool:
        """Whether the caller has left before."""
        with self._lock:
            self._ended = True
            self.done.release()
            return self._left

    def leave(self) -> bool:
        """Whether the work had not ended."""
        with self._lock:
            self._left = not self._ended
            return self._left


class _Worker:
    """One daemon thread that does what it is given, in turn."""

    def __init__(self, name: str, rest: Callable[[_Worker], bool]) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._next_turn = rest
        threading.Thread(target=self._run, name=f"{name}-io", daemon=True).start()

    def end(self) -> None:
        """End once it is idle."""
        self.work.put(None)

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()
            del work
            if not self._next_turn(self):
                return
