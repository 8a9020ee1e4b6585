"""What both plugins share: whole batches on worker threads, started, polled, or waited for.

The library can't cancel a transfer.  A batch that is late goes on; its buffers are ABANDONED where
the library moves bytes straight to them, and free where it has memory of its own (`bounced`).
"""

from __future__ import annotations

import itertools
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lmcache_backend_nixl.lanes import Closing, Lanes
from lmcache_core.sdk import (
    BackendUnavailable,
    BaseConnector,
    Buffer,
    ConfigError,
    GetResult,
    Health,
    HostServices,
    LeftBehind,
    OpContext,
    Pending,
    Region,
    Status,
    Workers,
)

L = TypeVar("L", bound=Closing)
R = TypeVar("R")
_CLOSE_S = 4.0


Finish = Callable[[], list[GetResult]]
"""Gives the results of a read; runs on the caller's thread, while the lane is still held."""


class _Get(Generic[L]):
    """A get on its way."""

    __slots__ = ("context", "lane", "pending", "targets")

    pending: Pending[Finish]

    def __init__(self, targets: Sequence[Buffer], context: OpContext) -> None:
        self.targets = targets
        self.context = context
        self.lane: L | None = None


class BatchConnector(BaseConnector, Generic[L]):
    """Thread-safe up to ``lanes`` calls.

    Args:
        make: a new lane.
        lanes: how many.
        host: services of core.
        bounced: a late batch never touches the caller's buffers.
    """

    def __init__(
        self, make: Callable[[], L], *, lanes: int, host: HostServices, bounced: bool
    ) -> None:
        super().__init__("nixl", clock=host.clock)
        self._lanes: Lanes[L] = Lanes(make, lanes)
        self._workers = Workers("nixl", max_stuck=lanes)
        self._released = host.released
        self._late = Status.TIMED_OUT if bounced else Status.ABANDONED
        self._count_late = host.counter("nixl.late_batches")
        self._regions: dict[int, Region] = {}
        self._tickets: dict[int, _Get[L]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        for region in host.regions():
            self.register_region(region)
        host.on_region_added(self.register_region)
        host.on_region_removed(self.unregister_region)

    @abstractmethod
    def _read(
        self, lane: L, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> Finish:
        """Read a whole batch, on a worker; TIMED_OUT for what was not started in time."""

    @abstractmethod
    def _write(
        self, lane: L, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        """Answer a whole put, on a worker."""

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        left_s = ctx.remaining_s(self._clock())
        if left_s <= 0 or not keys:
            return [GetResult(Status.TIMED_OUT)] * len(keys)
        get = self._start(keys, targets, ctx)
        if not get.pending.wait(left_s) and self._leave(get):
            return [GetResult(self._late)] * len(keys)
        return self._end(get)

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        return self._run(
            lambda lane: self._write(lane, keys, sources, ctx),
            len(keys), self._late, Status.TIMED_OUT, sources, ctx,
        )  # fmt: skip

    def register_region(self, region: Region) -> None:
        """Buffers of ``region`` need no registration of their own from now on."""
        with self._lock:
            self._regions = {**self._regions, region.region_id: region}

    def unregister_region(self, region: Region) -> None:
        """Forget ``region``; a lane drops it before its next transfer."""
        with self._lock:
            kept = {n: r for n, r in self._regions.items() if n != region.region_id}
            self._regions = kept

    def submit_get(self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext) -> int:
        """Start a get; `poll` tells what came of it, by ``ctx.deadline_s``.

        Raises:
            BackendUnavailable: too many transfers are late already.
        """
        self.check_call(keys, "get_into", targets)
        ticket = next(self._numbers)
        get = self._start(keys, list(targets), ctx)
        with self._lock:
            self._tickets[ticket] = get
        return ticket

    def poll(self, ticket: int) -> list[GetResult] | None:
        """Results once every key is decided, else None.

        Raises:
            KeyError: no such ticket, or its results were given already.
        """
        self.check_call((), "poll")
        get = self._tickets[ticket]
        if not get.pending.wait(0):
            if get.context.remaining_s(self._clock()) > 0:
                return None
            if self._leave(get):
                del self._tickets[ticket]
                return [GetResult(self._late)] * len(get.targets)
        del self._tickets[ticket]
        return self._end(get)

    def was_late(self) -> None:
        """A batch was left behind at its deadline."""

    def close_resources(self) -> None:
        for get in list(self._tickets.values()):
            if not self._leave(get):
                self._give_back(get)
        try:
            self._workers.run(self._lanes.close, _CLOSE_S, lambda: None)
        except (LeftBehind, BackendUnavailable):
            pass  # the library's own teardown goes on in its daemon thread
        self._workers.close()

    def _start(self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext) -> _Get[L]:
        get: _Get[L] = _Get(targets, ctx)

        def work() -> Finish:
            get.lane = self._take(ctx)
            if get.lane is None:
                return lambda: [GetResult(Status.TIMED_OUT)] * len(keys)
            return self._read(get.lane, keys, targets, ctx)

        get.pending = self._workers.begin(work)
        return get

    def _leave(self, get: _Get[L]) -> bool:
        """Go without the results; False when they are there after all."""

        def ended_late() -> None:
            self._give_back(get)
            self._release(get.targets)

        left = get.pending.leave(ended_late)
        if left:
            self._count_late.inc()
            self.was_late()
        return left

    def _end(self, get: _Get[L]) -> list[GetResult]:
        try:
            return get.pending.result()()
        finally:
            self._give_back(get)

    def _give_back(self, get: _Get[L]) -> None:
        if get.lane is not None:
            self._lanes.give(get.lane)
            get.lane = None

    def _run(
        self,
        work: Callable[[L], list[R]],
        count: int,
        late: R,
        early: R,
        buffers: Sequence[Buffer],
        ctx: OpContext,
    ) -> list[R]:
        """``work`` on a lane and a worker, until the deadline."""
        left_s = ctx.remaining_s(self._clock())
        if left_s <= 0 or not count:
            return [early] * count
        none = [early] * count
        try:
            return self._workers.run(
                lambda: self._on_lane(work, none, ctx), left_s, lambda: self._release(buffers)
            )
        except LeftBehind:
            self._count_late.inc()
            self.was_late()
            return [late] * count

    def _look(self, work: Callable[[L], Health], ctx: OpContext) -> Health:
        """``work`` on a lane; what went wrong is the answer."""
        late = Health(ok=False, reason="no answer before the deadline")
        try:
            return self._run(lambda lane: [work(lane)], 1, late, late, (), ctx)[0]
        except (BackendUnavailable, ConfigError) as error:
            return Health(ok=False, reason=error.message)

    def _on_lane(self, work: Callable[[L], list[R]], early: list[R], ctx: OpContext) -> list[R]:
        lane = self._take(ctx)
        if lane is None:
            return early
        try:
            return work(lane)
        finally:
            self._lanes.give(lane)

    def _take(self, ctx: OpContext) -> L | None:
        """A lane, or None past the deadline."""
        lane = self._lanes.take(ctx.remaining_s(self._clock()))
        if lane is not None and ctx.remaining_s(self._clock()) <= 0:
            self._lanes.give(lane)
            return None
        return lane

    def _release(self, buffers: Sequence[Buffer]) -> None:
        """A late batch has ended: tell core whose buffers were ABANDONED."""
        if self._late is Status.ABANDONED:
            for buffer in buffers:
                self._released(buffer.token)
