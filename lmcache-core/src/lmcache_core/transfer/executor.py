"""Where blocking calls run: bounded threads, loads before stores, results as values.

The engine's state belongs to one thread.  A job runs elsewhere and posts a callback to
`Completions`; the owner drains them in `poll`.  `Runtime` bundles clock, completions and
executors, so that a simulation can replace all three.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Lane(enum.IntEnum):
    """Order of service: every queued load starts before any queued store."""

    LOAD = 0
    STORE = 1


class Completions:
    """Callbacks from any thread to the owner's, in order of arrival.

    Args:
        wake: called after each arrival, from the thread that posts, for an owner that waits
            for more than this.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._arrived = threading.Event()
        self._wake = wake

    def post(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` run in the owner's next `drain`; thread-safe."""
        self._queue.append(callback)
        self._arrived.set()
        self._wake()

    def drain(self) -> int:
        """Run what has arrived; returns how many.  Owner only."""
        self._arrived.clear()
        count = 0
        while self._queue:
            self._queue.popleft()()
            count += 1
        return count

    def wait(self, timeout_s: float) -> None:
        """Return when something has arrived, at the latest after ``timeout_s``."""
        if not self._queue:
            self._arrived.wait(timeout_s)


class Executor(Protocol):
    """Runs jobs that block; a job never raises and posts its own result."""

    def submit(self, job: Callable[[], None], lane: Lane) -> bool:
        """Queue ``job``; False when the queue is full or closed: it will not run."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Drop what is queued, wait for what runs; False when something still runs."""
        ...


class ThreadExecutor:
    """``threads`` daemon threads over one bounded queue a lane.

    With more than one thread, stores never hold the last: a load need not wait for a slow one.
    """

    def __init__(self, name: str, *, threads: int, max_queued: int) -> None:
        self._lanes: tuple[deque[Callable[[], None]], ...] = (deque(), deque())
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._closed = False
        self._max_storing = max(1, threads - 1)
        self._storing = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None], lane: Lane) -> bool:
        with self._changed:
            if self._closed or len(self._lanes[lane]) >= self._max_queued:
                return False
            self._lanes[lane].append(job)
            self._changed.notify()
        return True

    def close(self, timeout_s: float) -> bool:
        with self._changed:
            self._closed = True
            for lane in self._lanes:
                lane.clear()
            self._changed.notify_all()
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            with self._changed:
                while (lane := self._next_lane()) is None:
                    if self._closed:
                        return
                    self._changed.wait()
                job = self._lanes[lane].popleft()
                self._storing += lane is Lane.STORE
            try:
                job()
            finally:
                if lane is Lane.STORE:
                    with self._changed:
                        self._storing -= 1
                        self._changed.notify()

    def _next_lane(self) -> Lane | None:
        if self._lanes[Lane.LOAD]:
            return Lane.LOAD
        if self._lanes[Lane.STORE] and self._storing < self._max_storing:
            return Lane.STORE
        return None


class Runtime:
    """Real clock, threads and waiting; ``wake`` as in `Completions`."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.completions = Completions(wake)

    def now_s(self) -> float:
        """Seconds on the clock of deadlines."""
        return time.monotonic()

    def executor(self, name: str, *, threads: int, max_queued: int) -> Executor:
        """A new executor of its own threads."""
        return ThreadExecutor(name, threads=threads, max_queued=max_queued)

    def wait(self, timeout_s: float) -> None:
        """Let jobs run until one completes or ``timeout_s`` has passed."""
        self.completions.wait(timeout_s)

    def every(self, interval_s: float, fire: Callable[[], bool]) -> None:
        """Call ``fire`` on a daemon thread every ``interval_s`` until it returns False."""

        def run() -> None:
            while True:
                time.sleep(interval_s)
                if not fire():
                    return

        threading.Thread(target=run, name="lmc-every", daemon=True).start()

    def bounded(self, job: Callable[[], None], limit_s: float) -> bool:
        """Run ``job`` on a daemon thread; False when it takes longer than ``limit_s``."""
        thread = threading.Thread(target=job, name="lmc-bounded", daemon=True)
        thread.start()
        thread.join(limit_s)
        return not thread.is_alive()
