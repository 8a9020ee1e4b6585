"""`AbandoningLoop`: a connector over blocking calls that move bytes straight to core's memory.

A system call on a disk that stands still can't be cancelled.  So a batch runs on a worker thread
while its caller waits, at most until the deadline: the key in flight is then ABANDONED (core keeps
its buffer away from others until the call ends), those not started are TIMED_OUT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lmcache_core.sdk.batch import BatchLoop
from lmcache_core.sdk.buffers import Buffer, ReleaseToken
from lmcache_core.sdk.connector import OpContext
from lmcache_core.sdk.status import Status
from lmcache_core.sdk.workers import Workers

T = TypeVar("T")


class AbandoningLoop(BatchLoop):
    """Like `BatchLoop`; the per-key functions may ignore ``timeout_s`` and block.

    Args:
        name: of the backend.
        released: `HostServices.released`; None runs everything on the caller's thread.
        max_stuck: batches that may be running past their deadline before `BackendUnavailable`.
        clock: of `OpContext.deadline_s`.
    """

    def __init__(
        self,
        name: str,
        *,
        released: Callable[[ReleaseToken], None] | None,
        clock: Callable[[], float],
        max_stuck: int = 8,
    ) -> None:
        super().__init__(name, clock=clock)
        self._released = released
        self._workers = Workers(name, max_stuck=max_stuck)

    @property
    def stuck_calls(self) -> int:
        """Batches that are past their deadline and still run."""
        return self._workers.stuck_calls

    def close(self) -> None:
        super().close()
        self._workers.close()

    def _each(
        self,
        keys: Sequence[bytes],
        ctx: OpContext,
        one: Callable[[bytes, float], T],
        wrap: Callable[[Status], T],
        buffers: Sequence[Buffer] = (),
    ) -> list[T]:
        if self._released is None or ctx.deadline_s <= self._clock() or not keys:
            return super()._each(keys, ctx, one, wrap, buffers)
        batch: _Batch[T] = _Batch()
        self._workers.start(lambda: self._run_batch(batch, keys, ctx, one, wrap, buffers))
        if not batch.ended.acquire(timeout=max(0.0, ctx.deadline_s - self._clock())):
            with batch.lock:
                # Ended meanwhile, or not one key is started from here on.
                batch.stopped = True
                in_flight = batch.started > len(batch.answers)
            if in_flight:
                return self._leave(batch, len(keys), wrap, buffers)
            batch.ended.acquire()
        if batch.error is not None:
            raise batch.error
        missing = len(keys) - len(batch.answers)
        return batch.answers + [wrap(Status.TIMED_OUT)] * missing

    def _run_batch(
        self,
        batch: _Batch[T],
        keys: Sequence[bytes],
        ctx: OpContext,
        one: Callable[[bytes, float], T],
        wrap: Callable[[Status], T],
        buffers: Sequence[Buffer],
    ) -> None:
        """On a worker: key after key, until the caller has gone."""
        for key in keys:
            with batch.lock:
                if batch.stopped:
                    break
                batch.started += 1
            try:
                answer = self._answer(key, ctx, one, wrap)
            except Exception as error:
                with batch.lock:
                    batch.error, batch.started = error, len(batch.answers)
                break
            with batch.lock:
                if answer is None:
                    batch.started -= 1
                    break
                batch.answers.append(answer)
        with batch.lock:
            left = batch.left
            batch.ended.release()
        if left:
            self._workers.came_back()
            if buffers and self._released is not None:
                self._released(buffers[batch.left_at].token)

    def _leave(
        self, batch: _Batch[T], count: int, wrap: Callable[[Status], T], buffers: Sequence[Buffer]
    ) -> list[T]:
        """Answer without the key in flight, unless it has just ended."""
        with batch.lock:
            done = list(batch.answers)
            if batch.started > len(done) and batch.error is None:
                batch.left, batch.left_at = True, len(done)
        rest = [wrap(Status.TIMED_OUT)] * (count - len(done))
        if batch.left:
            self._workers.left_behind()
            if buffers:
                rest[0] = wrap(Status.ABANDONED)
        return done + rest


class _Batch(Generic[T]):
    """What caller and worker share of one batch; guarded by ``lock``.

    ``started`` and ``answers`` count keys; one more started than answered is in flight.  ``left``:
    the caller has gone while key ``left_at`` was in flight.
    """

    __slots__ = ("answers", "ended", "error", "left", "left_at", "lock", "started", "stopped")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ended = threading.Lock()
        self.ended.acquire()
        self.answers: list[T] = []
        self.started = self.left_at = 0
        self.stopped = self.left = False
        self.error: Exception | None = None
