"""Copies between pages in device memory and the pinned arena, beside the forward pass.

`DeviceCopier` decides what is copied and in which order; `DeviceApi` is the little of a device
that it needs, `device.TorchApi` the real one.  Rules, each tested against a fake device that
shows wrong bytes when it is broken:

- A copy starts after what the compute stream held when it was submitted.  A store reads
  finished pages; a load is not overwritten by block zeroing that is still pending.
- A copy is done when its event says so, and the event is recorded after its last byte.
- Nothing waits for a stream or for the device: only for the event of one copy.
- What the driver may still read (address arrays, tensors, the arena) lives until then.

Sources: torch's notes "CUDA semantics" (streams, asynchronous execution, pinned memory); CUDA
runtime, cudaEventRecord: an event never recorded counts as complete, a wait captures the event's
state at the call; vLLM 0.32, v1/kv_offload/cpu/gpu_worker.py: both directions wait for compute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import numpy as np

from lmcache_core.sdk.errors import ConfigError, ContractViolation, LMCacheError
from lmcache_core.transfer.page_moves import (
    I64,
    CopyBatch,
    LayerPages,
    Moves,
    merged_runs,
    overlap,
)

MAX_BATCH = 4096
"""Copies in one call of the driver."""
MAX_IN_FLIGHT = 256
"""Submitted and not done, in each direction; a further one is refused."""
_POLL_S = 0.001


class CopyRefused(LMCacheError):
    """The copier is closed, or has too many copies in flight.  Nothing was touched."""

    retryable = True


class DeviceApi(Protocol):
    """Streams, events and copies of one device; streams and events are opaque.

    No call waits for the device except `synchronize`, and `copy` when not ``pinned``.
    Thread-safe.  Any call may raise what the driver reports, also for earlier work.
    """

    host_address: int
    host_nbytes: int
    pinned: bool

    def compute_stream(self) -> Any:
        """The calling thread's current stream."""
        ...

    def new_stream(self, *, high_priority: bool) -> Any: ...

    def record(self, stream: Any) -> Any:
        """A new event: complete when all that ``stream`` holds now is."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Whatever is enqueued on ``stream`` from now on starts after ``event``."""
        ...

    def copy(self, stream: Any, batch: CopyBatch, *, to_host: bool) -> None:
        """Enqueue; ``batch`` stays as it is until the copies have ended."""
        ...

    def query(self, event: Any) -> bool:
        """Whether it is complete."""
        ...

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until it is complete."""
        ...


@dataclass(eq=False, slots=True)
class DeviceCopy:
    """One submitted copy, made by `DeviceCopier.submit`.

    Every method may be called from any thread, `order_before_compute` from the model runner's
    only.  There is no lock: a race repeats a query or records a second, later event.
    """

    _api: DeviceApi | None  # None: ended, and nothing of the device is held any more
    _stream: Any
    _batches: Sequence[CopyBatch] = ()
    _submitted: bool = False
    _event: Any = None
    _error: Exception | None = None

    def done(self) -> bool:
        """Whether it has ended, well or not: no byte is read or written any more.  Never blocks.

        While the device answers with errors this stays False: pages that a copy may still
        write are not given back.
        """
        api = self._api
        if api is None:
            return True
        if not self._submitted or not self._has_event(api):
            return False
        try:
            ended = api.query(self._event)
        except Exception as error:  # whatever the driver says: not known to have ended
            self._fail(error)
            return False
        if ended:
            self._end()
        return ended

    def wait(self) -> bool:
        """Block until it has ended; False when the device can't tell (see `error`)."""
        api = self._api
        if api is not None and self._submitted and self._has_event(api):
            try:
                api.synchronize(self._event)
            except Exception as error:  # as in `done`
                self._fail(error)
                return False
        return self.done()

    def error(self) -> Exception | None:
        """What went wrong so far.  Pages are free, and bytes final, only when also `done`."""
        return self._error

    def order_before_compute(self) -> bool:
        """Have the compute stream go on after this copy, without blocking the thread.

        Returns:
            True: the next forward sees the loaded bytes (or, for a store, may overwrite the
            pages).  False: the order is not certain or the copy failed; `wait` and look at
            `error`.
        """
        api, event = self._api, self._event
        if api is not None:
            if event is None:
                return False
            try:
                api.wait(api.compute_stream(), event)
            except Exception as error:  # as in `done`
                self._fail(error)
        return self._error is None

    def _start(self, after: Any, batches: Sequence[CopyBatch], *, to_host: bool) -> None:
        api = self._api
        assert api is not None
        try:
            api.wait(self._stream, after)
            for batch in batches:
                self._batches = batches  # from here on the driver may hold them
                api.copy(self._stream, batch, to_host=to_host)
        except Exception as error:  # a part may be under way: ended only by the event
            self._fail(error)
        if self._batches:
            self._has_event(api)
            self._submitted = True
        else:
            self._end()

    def _has_event(self, api: DeviceApi) -> bool:
        if self._event is None:
            try:
                self._event = api.record(self._stream)
            except Exception as error:  # tried again by the next `done`
                self._fail(error)
        return self._event is not None

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error

    def _end(self) -> None:
        # Not the event: another thread may be about to query it.
        self._api, self._batches = None, ()


@dataclass(slots=True)
class _Lane:
    stream: Any
    copies: deque[DeviceCopy] = field(default_factory=deque)

    def reap(self) -> int:
        """Forget copies that have ended, oldest first; how many are left."""
        while self.copies and self.copies[0].done():
            self.copies.popleft()
        return len(self.copies)


class DeviceCopier:
    """Enqueues page copies on two streams of its own, so loads do not queue behind stores.

    The loads' stream has high priority; CUDA applies that to kernels only, copies profit from
    the stream of their own.  `submit` may be called from any thread; give it a `fence` when that
    is not the model runner's, because a thread's current stream is its own.

    Args:
        layers: the pages of each layer; sizes may differ.
        api: the device; its memory and the host memory outlive this copier's `close`.
        warn: gets one line when host memory is not pinned: then `submit` blocks while it copies.
        max_batch: copies in one call of the driver.
        max_in_flight: copies submitted and not done, in each direction.
        now_s, sleep: clock of `close`, seconds.
    """

    def __init__(
        self,
        layers: Sequence[LayerPages],
        api: DeviceApi,
        *,
        warn: Callable[[str], None],
        max_batch: int = MAX_BATCH,
        max_in_flight: int = MAX_IN_FLIGHT,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not layers or max_batch < 1 or max_in_flight < 1:
            raise ConfigError("a device copier needs layers and positive limits", op="device")
        rows = [astuple(layer) for layer in layers]
        self._layers: I64 = np.array(rows, dtype=np.int64)
        self._api: DeviceApi | None = api
        self._loads = _Lane(api.new_stream(high_priority=True))
        self._stores = _Lane(api.new_stream(high_priority=False))
        self._max_batch, self._max_in_flight = max_batch, max_in_flight
        self._now_s, self._sleep = now_s, sleep
        self._closed = False
        self._lock = threading.Lock()
        if not api.pinned:
            warn("host memory is not pinned: copies to and from the device block their caller")

    def fence(self) -> Any:
        """A point in the calling thread's current stream, for ``submit(after=...)``.

        Raises: what the driver reports.
        """
        if self._api is None:
            raise CopyRefused("the copier is closed", op="fence")
        return self._api.record(self._api.compute_stream())

    def submit(self, moves: Moves, *, to_host: bool, after: Any = None) -> DeviceCopy:
        """Enqueue a store (``to_host``) or a load; neither raises nor blocks (if pinned).

        Until the copy is done: a store's pages are written by nothing but what runs after
        `order_before_compute`, its arena bytes are not read; a load's arena bytes are final
        before the call and unchanged; and no move of a load overlaps pages of another.

        Args:
            after: a `fence`; without one, now in the calling thread's current stream.

        Returns:
            The copy.  `error` is `CopyRefused` or `ContractViolation` when nothing was touched.
        """
        lane = self._stores if to_host else self._loads
        copy = DeviceCopy(self._api, lane.stream)
        if (refusal := self._admit(lane, copy)) is not None:
            copy._fail(refusal)
            copy._end()
            return copy
        api = copy._api
        assert api is not None
        try:
            after = self.fence() if after is None else after
            batches = list(self._batches(api, moves, to_host=to_host))
        except Exception as error:  # a wrong move, or the driver's: nothing was enqueued
            copy._fail(error)
            copy._end()
            return copy
        copy._start(after, batches, to_host=to_host)
        return copy

    def close(self, timeout_s: float) -> bool:
        """Refuse new copies and wait for those in flight, at most ``timeout_s``.

        Returns:
            Whether all have ended and memory may be unpinned and freed.  A later call tries
            again.
        """
        self._closed = True
        end_s = self._now_s() + timeout_s
        while self.in_flight():
            if self._now_s() >= end_s:
                return False
            self._sleep(_POLL_S)
        self._api = None
        return True

    def in_flight(self) -> int:
        """Copies submitted and not done."""
        with self._lock:
            return self._loads.reap() + self._stores.reap()

    def _admit(self, lane: _Lane, copy: DeviceCopy) -> CopyRefused | None:
        with self._lock:
            if self._closed:
                return CopyRefused("the copier is closed", op="submit")
            if lane.reap() >= self._max_in_flight:
                return CopyRefused(f"{self._max_in_flight} copies are in flight", op="submit")
            lane.copies.append(copy)
            return None

    def _batches(self, api: DeviceApi, moves: Moves, *, to_host: bool) -> Iterator[CopyBatch]:
        device, host, nbytes = merged_runs(self._layers, api.host_nbytes, moves)
        host += api.host_address
        sources, targets = (device, host) if to_host else (host, device)
        if overlap(targets, nbytes):
            raise ContractViolation("moves overlap in their target", op="submit")
        for start in range(0, len(nbytes), self._max_batch):
            part = slice(start, start + self._max_batch)
            yield CopyBatch(sources[part], targets[part], nbytes[part])
