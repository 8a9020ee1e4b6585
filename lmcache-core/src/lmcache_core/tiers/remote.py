"""Any `RemoteConnector` as a tier: deadlines, breaker, bounded queues, quota, envelope.

Owner-thread methods queue jobs on the tier's executor and return at once; answers come
back through the runtime's completions.  A job touches only its own chunks' slots, which
the owner keeps (WRITING or pinned) until the job has settled.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lmcache_core import envelope
from lmcache_core.config import TierConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    Buffer,
    GetResult,
    LMCacheError,
    OpContext,
    ReleaseToken,
    RemoteConnector,
    ScanEntry,
    Status,
    SupportsScan,
)
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.quota import Quota
from lmcache_core.transfer.breaker import Breaker
from lmcache_core.transfer.executor import Lane, Runtime

_TOLD_BY_STORE = {Status.OK, Status.MISS, Status.SIZE_MISMATCH, Status.CORRUPT, Status.REJECTED}


@dataclass(slots=True)
class _Call:
    """One call, from its queueing until it has settled.  ``deadline_s`` is known once it
    has started: waiting for a thread of ours is no fault of the store."""

    deadline_s: float = math.inf
    overdue: bool = False


class RemoteTier:
    """One tier below host.  Owner thread only, except inside its own jobs.

    Args:
        name: in metrics and hit reports.
        connector: open; the tier closes it.
        host: whose slots are read and written.
        layout: of every chunk.
    """

    def __init__(
        self,
        name: str,
        connector: RemoteConnector,
        *,
        config: TierConfig,
        host: HostTier,
        layout: ChunkLayout,
        runtime: Runtime,
        metrics: Metrics,
    ) -> None:
        self.name = name
        self.config = config
        self.connector = connector
        self._host = host
        self._layout = layout
        self._runtime = runtime
        self._metrics = metrics
        threads = max(1, min(config.threads, connector.capabilities.max_concurrency))
        self._executor = runtime.executor(
            f"lmc-{name}", threads=threads, max_queued=config.max_queued
        )
        self._breaker = Breaker(
            failures_to_open=config.failures_to_open, probe_interval_s=config.probe_interval_s
        )
        self._calls: dict[int, _Call] = {}
        self._call_ids = itertools.count()
        self._quota = Quota(config.size_bytes)
        self._waiting: deque[tuple[HostChunk, int, Callable[[Status], None]]] = deque()
        self._max_batch = max(1, min(connector.capabilities.max_batch, 128))

    def count(self, event: str, amount: int = 1) -> None:
        """Count ``event`` under this tier's name."""
        self._metrics.counter(f"{self.name}.{event}").inc(amount)

    @property
    def available(self) -> bool:
        """Whether requests may use the tier now."""
        return not self._breaker.is_open and self._host.lost_bytes <= self.config.max_lost_bytes

    @property
    def unavailable_reason(self) -> str:
        """Why the breaker is open; "" while closed."""
        return self._breaker.reason

    @property
    def settling(self) -> bool:
        """Whether answers are still to come in time."""
        return self.available and any(not call.overdue for call in self._calls.values())

    @property
    def used_bytes(self) -> int:
        """Bytes that are or may be on the store, as far as we know."""
        return self._quota.used_bytes

    def recover(self) -> None:
        """Learn what an earlier process left, with its sizes; blocks; called at open."""
        if not isinstance(self.connector, SupportsScan) or not self.connector.capabilities.scan:
            return
        ctx = OpContext(deadline_s=self._runtime.now_s() + 60.0)
        entries: list[ScanEntry] = sorted(
            self.connector.scan(b"", ctx), key=lambda entry: entry.used_at_s
        )
        for entry in entries:
            self._quota.found(entry.key, entry.nbytes)
        self._evict(0)

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is stored here, leaving, or on its way here, as far as we know."""
        return key in self._quota or any(chunk.key == key for chunk, _, _ in self._waiting)

    def exists(self, keys: Sequence[bytes], done: Callable[[list[bool]], None]) -> None:
        """Ask for ``keys`` in batches; ``done`` gets one answer a key, in order."""
        if not self.available:
            self.count("skipped_breaker", len(keys))
            done([False] * len(keys))
            return
        answers = [False] * len(keys)
        waiting = len(range(0, len(keys), self._max_batch))

        def settle(start: int, statuses: Sequence[Status]) -> None:
            nonlocal waiting
            for i, status in enumerate(statuses):
                answers[start + i] = status is Status.OK
            waiting -= 1
            if not waiting:
                done(answers)

        for start in range(0, len(keys), self._max_batch):
            batch = list(keys[start : start + self._max_batch])
            self._call(
                "exists",
                Lane.LOAD,
                len(batch),
                partial(self.connector.exists, batch),
                partial(settle, start),
            )

    def fetch(self, chunk: HostChunk, done: Callable[[Status], None]) -> None:
        """Fill the WRITING ``chunk``; OK only when its envelope was verified.

        ``done`` comes when nobody but the owner can touch the slot any more, or with
        ABANDONED, in which case the slot is to be lost.
        """
        slot = self._host.slot(chunk)
        buffer = self._buffer(chunk, slot)
        verdict: list[str] = []

        def run(ctx: OpContext) -> list[Status]:
            result: GetResult = self.connector.get_into([chunk.key], [buffer], ctx)[0]
            if result.status is not Status.OK:
                return [result.status]
            found = envelope.Verdict.LENGTH
            if result.nbytes == envelope.stored_bytes(chunk.payload_bytes):
                found = envelope.verify(slot, key=chunk.key, layout=self._layout.fingerprint)
            if found is not envelope.Verdict.OK:
                verdict.append(found.value)
                return [Status.CORRUPT]
            chunk.framed = True
            return [Status.OK]

        def answered(statuses: list[Status]) -> None:
            status = statuses[0]
            if status is Status.OK:
                chunk.origin = self.name
                self._quota.touch(chunk.key)
            elif status is Status.MISS:
                self._quota.forget([chunk.key])
            elif status in (Status.CORRUPT, Status.SIZE_MISMATCH):
                self.count("corrupt")
                self.count(f"corrupt.{verdict[0] if verdict else status.value}")
                self.delete([chunk.key])
            done(status)

        self._call("get", Lane.LOAD, 1, run, answered)

    def store(self, chunk: HostChunk, done: Callable[[Status], None]) -> None:
        """Write the pinned, SEALED ``chunk``; ``done`` when its slot is the owner's again.

        Where the quota is full the put waits until older chunks are confirmed deleted, so
        the tier never holds more than ``size_bytes``.
        """
        nbytes = envelope.stored_bytes(chunk.payload_bytes)
        if not self.available:
            self.count("dropped_breaker")
            done(Status.FAILED)
        elif self.holds(chunk.key):
            # A second copy beside the first, even for a moment, would not be counted.
            done(Status.OK)
        elif len(self._waiting) >= self.config.max_queued:
            self.count("dropped_queue.put")
            done(Status.REJECTED)
        else:
            self._waiting.append((chunk, nbytes, done))
            self._pump()

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove ``keys`` in the background; their room is free once that is confirmed."""
        for start in range(0, len(keys), self._max_batch):
            batch = list(keys[start : start + self._max_batch])
            self._quota.delete_started(batch)
            self._call(
                "delete",
                Lane.STORE,
                len(batch),
                partial(self.connector.delete, batch),
                partial(self._deleted, batch),
            )

    def keys_of(self, tag: bytes) -> list[bytes]:
        """Known keys of one namespace tag."""
        return self._quota.keys_of(tag)

    def tick(self) -> None:
        """Notice overdue calls and run a due probe; called in every poll."""
        now_s = self._runtime.now_s()
        for call in self._calls.values():
            if not call.overdue and now_s > call.deadline_s + 0.25:
                call.overdue = True
                self.count("overdue")
                self._failed("a call is past its deadline", fatal=True)
        if self._breaker.wants_probe(now_s):
            self.count("probes")
            self._call("probe", Lane.LOAD, 1, self._probe, self._probed)

    def close(self, timeout_s: float) -> bool:
        """Close executor and connector, each within its limit; False when a call still runs."""
        clean = self._executor.close(timeout_s)
        closed = self._runtime.bounded(self._close_connector, CLOSE_LIMIT_S)
        if not closed:
            self.count("close_overdue")
        return clean and closed

    def _close_connector(self) -> None:
        try:
            self.connector.close()
        except Exception:  # a foreign close must not keep the engine from closing
            self.count("close_failed")

    def _probe(self, ctx: OpContext) -> list[Status]:
        return [Status.OK if self.connector.health(ctx).ok else Status.FAILED]

    def _probed(self, statuses: list[Status]) -> None:
        self._breaker.probed(self._runtime.now_s(), ok=statuses[0] is Status.OK)

    def _call(
        self,
        op: str,
        lane: Lane,
        width: int,
        run: Callable[[OpContext], list[Status]],
        answered: Callable[[list[Status]], None],
    ) -> None:
        """Queue ``run``; ``answered`` gets ``width`` statuses in the owner thread, always.

        A load has its deadline from now on, since a request waits for it; a store from when
        it starts.
        """
        call_id = next(self._call_ids)
        call = self._calls[call_id] = _Call()
        latest_s = self._runtime.now_s() + self.config.deadline_s if lane is Lane.LOAD else math.inf

        def settle(statuses: list[Status], error: LMCacheError | None) -> None:
            del self._calls[call_id]
            if op != "probe":
                self._judge(op, statuses, error)
            answered(statuses)

        def refuse() -> None:
            del self._calls[call_id]
            self.count(f"dropped_queue.{op}", width)
            answered([Status.FAILED] * width)

        def job() -> None:
            now_s = self._runtime.now_s()
            if now_s >= latest_s:
                self._runtime.completions.post(refuse)
                return
            call.deadline_s = min(latest_s, now_s + self.config.deadline_s)
            error: LMCacheError | None = None
            try:
                statuses = run(OpContext(deadline_s=call.deadline_s))
                if len(statuses) != width:
                    raise LMCacheError("an answer of the wrong length", op=op)
            except Exception as caught:  # the boundary to foreign code: counted, never lost
                error = caught if isinstance(caught, LMCacheError) else LMCacheError(repr(caught))
                statuses = [Status.FAILED] * width
            self._runtime.completions.post(lambda: settle(statuses, error))

        if not self._executor.submit(job, lane):
            self._runtime.completions.post(refuse)

    def _judge(self, op: str, statuses: Sequence[Status], error: LMCacheError | None) -> None:
        if error is not None:
            self.count(f"error.{type(error).__name__}")
            fatal = isinstance(error, (BackendUnavailable, BackendClosed))
            self._failed(str(error), fatal=fatal)
        elif any(s in (Status.TIMED_OUT, Status.ABANDONED) for s in statuses):
            self._failed(f"{op} missed its deadline", fatal=True)
        elif any(s in _TOLD_BY_STORE for s in statuses):
            self._breaker.success()
        else:
            self._failed(f"{op} failed", fatal=False)
        for status in statuses:
            if status not in (Status.OK, Status.MISS):
                self.count(f"{op}.{status.value}")

    def _failed(self, reason: str, *, fatal: bool) -> None:
        if self._breaker.failure(self._runtime.now_s(), reason, fatal=fatal):
            self.count("breaker_opened")

    def _buffer(self, chunk: HostChunk, view: memoryview) -> Buffer:
        region = self._host.arena.region
        return Buffer(
            view=view,
            address=region.address + chunk.offset,
            nbytes=len(view),
            memory=region.memory,
            region=region,
            token=ReleaseToken(chunk.offset),
        )

    def _put(self, chunk: HostChunk, nbytes: int, done: Callable[[Status], None]) -> None:
        slot = self._host.slot(chunk)
        buffer = self._buffer(chunk, slot.toreadonly())

        def run(ctx: OpContext) -> list[Status]:
            with chunk.frame_lock:
                if not chunk.framed:
                    envelope.seal(
                        slot,
                        key=chunk.key,
                        layout=self._layout.fingerprint,
                        payload_bytes=chunk.payload_bytes,
                    )
                    chunk.framed = True
            return self.connector.put_from([chunk.key], [buffer], ctx)

        def answered(statuses: list[Status]) -> None:
            ok = statuses[0] is Status.OK
            self._quota.put_ended(chunk.key, chunk.parent, ok=ok)
            if ok:
                self.count("stored")
                self.count("stored_bytes", nbytes)
            else:
                # In doubt: the room stays taken until a delete is confirmed.
                self.delete([chunk.key])
            done(statuses[0])

        self._quota.put_started(chunk.key, nbytes)
        self._call("put", Lane.STORE, 1, run, answered)

    def _pump(self) -> None:
        """Start the waiting puts that fit; have older chunks deleted for the others."""
        while self._waiting:
            chunk, nbytes, done = self._waiting[0]
            if not self._quota.fits(nbytes):
                if self.available and nbytes <= self.config.size_bytes:
                    self._evict(sum(item[1] for item in self._waiting))
                    if self._quota.has_leaving:
                        return
                self._waiting.popleft()
                self.count("dropped_full")
                done(Status.REJECTED)
                continue
            self._waiting.popleft()
            self._put(chunk, nbytes, done)

    def _evict(self, nbytes: int) -> None:
        victims = self._quota.choose_victims(nbytes)
        if victims:
            self.count("evicted", len(victims))
            self.delete(victims)

    def _deleted(self, keys: Sequence[bytes], statuses: Sequence[Status]) -> None:
        gone = [key for key, status in zip(keys, statuses) if status is Status.OK]
        self._quota.delete_ended(keys, gone)
        if len(gone) < len(keys) and self._waiting:
            _, _, done = self._waiting.popleft()
            self.count("dropped_full")
            done(Status.REJECTED)
        self._pump()
