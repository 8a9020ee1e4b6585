"""Moving spans between pages and slots beside the engine: `Mover`, and the one for host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from lmcache_core.integrations.vllm.metadata import Span
from lmcache_core.integrations.vllm.pages import CpuPages
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics


class Copy(Protocol):
    """Spans on their way.  Model runner's thread only."""

    def done(self) -> bool:
        """Whether nobody can still touch the pages or slots.  Never blocks."""
        ...

    def wait(self) -> None:
        """Block until `done`."""
        ...

    def hold_back(self) -> None:
        """See that the forward passes from now on start when it is done."""
        ...

    def error(self) -> BaseException | None:
        """Why it failed, once `done`."""
        ...


class Mover(Protocol):
    """Copies of one worker.  Model runner's thread only."""

    def submit(
        self, arena: Arena, spans: Sequence[Span], *, to_host: bool, now: bool = False
    ) -> Copy:
        """Start; with ``now`` the caller is going to wait for it, and may help."""
        ...

    def release(self, timeout_s: float) -> bool:
        """Let go of the arena; False when copies still run after ``timeout_s``."""
        ...

    def close(self) -> None:
        """End every copy."""
        ...


class PoolMover:
    """`Mover` for pages in host memory: threads that copy.

    Args:
        metrics: gets the seconds of each copy.
    """

    def __init__(self, pages: CpuPages, *, threads: int, metrics: Metrics) -> None:
        self._pages = pages
        self._threads = threads
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(threads, "lmc-copy")
        self._running: set[Future[None]] = set()

    def submit(
        self, arena: Arena, spans: Sequence[Span], *, to_host: bool, now: bool = False
    ) -> PoolCopy:
        """See `Mover.submit`."""
        parts = [spans[i :: self._threads] for i in range(self._threads)]
        mine = parts.pop(0) if now else []
        futures = [self._pool.submit(self._copy, arena, p, to_host) for p in parts if p]
        self._running = {f for f in self._running if not f.done()}.union(futures)
        if mine:
            futures.append(_run(lambda: self._copy(arena, mine, to_host)))
        return PoolCopy(futures)

    def release(self, timeout_s: float) -> bool:
        """See `Mover.release`."""
        return not wait(self._running, timeout_s).not_done

    def close(self) -> None:
        """See `Mover.close`."""
        self._pool.shutdown(wait=True, cancel_futures=False)

    def _copy(self, arena: Arena, spans: Sequence[Span], to_host: bool) -> None:
        start_s = time.perf_counter()
        move = self._pages.offload if to_host else self._pages.onboard
        move(arena, spans)
        name = "copy.offload_seconds" if to_host else "copy.onboard_seconds"
        self._metrics.histogram(name).observe(time.perf_counter() - start_s)


class PoolCopy:
    """`Copy` of a `PoolMover`."""

    def __init__(self, futures: Sequence[Future[None]]) -> None:
        self._futures = futures

    def done(self) -> bool:
        """See `Copy.done`."""
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """See `Copy.wait`."""
        wait(self._futures)

    def hold_back(self) -> None:
        """See `Copy.hold_back`."""
        wait(self._futures)

    def error(self) -> BaseException | None:
        """See `Copy.error`."""
        errors = (future.exception() for future in self._futures)
        return next((error for error in errors if error is not None), None)


class FailedCopy:
    """`Copy` that could not start."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def done(self) -> bool:
        """See `Copy.done`."""
        return True

    def wait(self) -> None:
        """See `Copy.wait`."""

    def hold_back(self) -> None:
        """See `Copy.hold_back`."""

    def error(self) -> BaseException | None:
        """See `Copy.error`."""
        return self._error


def _run(work: Callable[[], None]) -> Future[None]:
    """What the pool does, in this thread."""
    future: Future[None] = Future()
    try:
        work()
        future.set_result(None)
    except Exception as error:  # reported to the engine as a failed copy
        future.set_exception(error)
    return future
