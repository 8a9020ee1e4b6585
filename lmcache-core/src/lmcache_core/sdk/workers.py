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
IDLE_S = 1.0


class LeftBehind(Exception):
    """Raised by `Workers.run`: the work still runs, and may still touch what it was given."""


class Workers:
    """Daemon threads that are kept for `IDLE_S` when idle; thread-safe.

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
        pending = self.begin(work)
        if not pending.wait(timeout_s) and pending.leave(ended_late):
            raise LeftBehind(f"no answer within {timeout_s:.3f} s")
        return pending.result()

    def begin(self, work: Callable[[], T]) -> Pending[T]:
        """``work`` on a worker, for a caller that asks later.

        Raises:
            BackendUnavailable: see `run`.
        """
        pending: Pending[T] = Pending(self)
        self.start(lambda: pending.end(work))
        return pending

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
        (worker or _Worker(self)).work.put(work)

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

    @property
    def name(self) -> str:
        """Of the backend."""
        return self._name

    def keep(self, worker: _Worker) -> bool:
        """Keep a worker that is done; False when it should end."""
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
            return not self._closed

    def drop(self, worker: _Worker) -> bool:
        """Let an idle worker end; False when it has just been given work."""
        with self._lock:
            idle = worker in self._idle
            if idle:
                self._idle.remove(worker)
            return idle


class Pending(Generic[T]):
    """One piece of work: either it ends first, or its caller leaves first.  Made by
    `Workers.begin`; one thread waits for it."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._ended = False
        self._ended_late: Callable[[], None] | None = None
        # A bare lock costs a tenth of an Event.
        self._running = threading.Lock()
        self._running.acquire()
        self._value: T | None = None
        self._error: Exception | None = None

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within so long; 0 only asks."""
        if not self._ended and self._running.acquire(timeout=max(0.0, timeout_s)):
            self._running.release()
        return self._ended

    def result(self) -> T:
        """What the ended work returned, or raised."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def leave(self, ended_late: Callable[[], None]) -> bool:
        """Wait no more; ``ended_late`` will be called.  False when it has just ended: then
        `result` is there, and nothing will be called."""
        with self._lock:
            if self._ended:
                return False
            self._ended_late = ended_late
        self._workers.left_behind()
        return True

    def end(self, work: Callable[[], T]) -> None:
        """Do the work, on a worker."""
        try:
            self._value = work()
        except Exception as error:  # raised again in the caller
            self._error = error
        with self._lock:
            self._ended = True
            self._running.release()
            late = self._ended_late
        if late is not None:
            self._workers.came_back()
            late()


class _Worker:
    """One daemon thread that does what it is given, in turn."""

    def __init__(self, workers: Workers) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._workers = workers
        threading.Thread(target=self._run, name=f"{workers.name}-io", daemon=True).start()

    def end(self) -> None:
        """End once it is idle."""
        self.work.put(None)

    def _run(self) -> None:
        while True:
            try:
                work = self.work.get(timeout=IDLE_S)
            except queue.Empty:
                if self._workers.drop(self):
                    return
                continue
            if work is None:
                return
            work()
            del work
            if not self._workers.keep(self):
                return
