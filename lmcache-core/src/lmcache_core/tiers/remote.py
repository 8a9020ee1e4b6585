"""Any `RemoteConnector` as a tier: what it holds, its quota, and the envelope of every chunk.

Owner-thread methods queue jobs on the tier's executor and return at once; answers come
back through the runtime's completions.  A job touches only its own chunks' slots, which
the owner keeps (WRITING or pinned) until the job has settled.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lmcache_core import envelope
from lmcache_core.config import TierConfig
from lmcache_core.logs import EventLog
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    Buffer,
    GetResult,
    OpContext,
    ReleaseToken,
    RemoteConnector,
    ScanEntry,
    Sharing,
    Status,
    SupportsScan,
)
from lmcache_core.tiers.calls import Calls
from lmcache_core.tiers.host import HostChunk, HostTier
from lmcache_core.tiers.quota import Quota
from lmcache_core.transfer.executor import Lane, Runtime

PUT_BYTES = 4 << 20
"""Chunks are put together until they have so many bytes."""


class _Put(NamedTuple):
    chunk: HostChunk
    nbytes: int
    done: Callable[[Status], None]


class RemoteTier:
    """One tier below host.  Owner thread only, except inside its own jobs.

    Args:
        name: in metrics and hit reports.
        connector: open; the tier closes it.
        host: whose slots are read and written.

    Attributes:
        on_change: told each key that was stored here, and each that was deleted.
    """

    def __init__(
        self,
        name: str,
        connector: RemoteConnector,
        *,
        config: TierConfig,
        host: HostTier,
        runtime: Runtime,
        metrics: Metrics,
    ) -> None:
        self.name = name
        self.config = config
        self.connector = connector
        self._host = host
        self._runtime = runtime
        self._metrics = metrics
        self._log = EventLog(runtime.now_s)
        self._calls = Calls(
            name, connector, config=config, runtime=runtime, count=self.count, log=self._log
        )
        self.on_change: Callable[[bytes, bool], None] = lambda key, present: None
        self._absent: OrderedDict[bytes, float] = OrderedDict()
        self._quota = Quota(config.size_bytes)
        self._waiting: deque[_Put] = deque()
        self._max_batch = max(1, min(connector.capabilities.max_batch, 128))

    def count(self, event: str, amount: int = 1) -> None:
        """Count ``event`` under this tier's name."""
        self._metrics.counter(f"{self.name}.{event}").inc(amount)

    @property
    def available(self) -> bool:
        """Whether requests may use the tier now."""
        return self._calls.allowed and self._host.lost_bytes <= self.config.max_lost_bytes

    @property
    def unavailable_reason(self) -> str:
        """Why the breaker is open; "" while closed."""
        return self._calls.refusal

    @property
    def settling(self) -> bool:
        """Whether answers are still to come in time."""
        return self.available and self._calls.in_time

    @property
    def used_bytes(self) -> int:
        """Bytes that are or may be on the store, as far as we know."""
        return self._quota.used_bytes

    def recover(self) -> None:
        """Learn what an earlier process left, with its sizes; blocks; called at open."""
        if not isinstance(self.connector, SupportsScan) or not self.connector.capabilities.scan:
            return
        if not self.config.size_bytes and self.connector.capabilities.sharing is Sharing.CLUSTER:
            # Its own server bounds it, and what it holds may be millions of others' chunks.
            return
        ctx = OpContext(deadline_s=self._runtime.now_s() + 60.0)
        entries: list[ScanEntry] = sorted(
            self.connector.scan(b"", ctx), key=lambda entry: entry.used_at_s
        )
        for entry in entries:
            self._quota.found(entry.key, entry.nbytes)
        self._evict(0)

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is stored here to stay, or on its way here, as far as we know."""
        stays = key in self._quota and not self._quota.is_leaving(key)
        return stays or any(put.chunk.key == key for put in self._waiting)

    def exists(self, keys: Sequence[bytes], done: Callable[[list[bool], str], None]) -> None:
        """Ask for ``keys`` in batches; ``done`` gets one answer a key, in order, and why the
        store could not be asked ("" when it could).

        What it lacked a moment ago is not asked again.
        """
        if not self.available:
            self.count("skipped_breaker", len(keys))
            done([False] * len(keys), "breaker")
            return
        answers = [False] * len(keys)
        asked = self._not_known_absent(keys)
        stamps = [self._quota.stamp(keys[i]) for i in asked]
        self.count("skipped_absent", len(keys) - len(asked))
        waiting = len(range(0, len(asked), self._max_batch))
        why = ""
        if not waiting:
            done(answers, why)
            return

        def settle(start: int, statuses: Sequence[Status]) -> None:
            nonlocal waiting, why
            for position, status in enumerate(statuses, start):
                key = keys[asked[position]]
                answers[asked[position]] = status is Status.OK
                if status is Status.MISS:
                    self._quota.vanished(key, stamps[position])
                    self._note_absent(key)
                elif status is not Status.OK:
                    why = "deadline" if status is Status.TIMED_OUT else "failed"
            waiting -= 1
            if not waiting:
                done(answers, why)

        for start in range(0, len(asked), self._max_batch):
            batch = [keys[i] for i in asked[start : start + self._max_batch]]
            self._calls.start(
                "exists",
                Lane.LOAD,
                len(batch),
                partial(self.connector.exists, batch),
                partial(settle, start),
            )

    def fetch(
        self,
        chunk: HostChunk,
        done: Callable[[Status | None], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Fill the WRITING ``chunk``; OK only when its envelope was verified.

        ``done`` comes when nobody but the owner can touch the slot any more, or with
        ABANDONED, in which case the slot is to be lost; with None when nothing was tried,
        since ``wanted``, asked in the worker's thread, had turned False.
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
                found = envelope.verify(slot, key=chunk.key, layout=chunk.layout.fingerprint)
            if found is not envelope.Verdict.OK:
                verdict.append(found.value)
                return [Status.CORRUPT]
            chunk.framed = True
            return [Status.OK]

        def answered(statuses: list[Status]) -> None:
            status = statuses[0]
            if status is Status.OK:
                chunk.origin = self.name
                self.count("read_bytes", envelope.stored_bytes(chunk.payload_bytes))
                self._quota.touch(chunk.key)
            elif status is Status.MISS:
                self._quota.forget([chunk.key])
            elif status in (Status.CORRUPT, Status.SIZE_MISMATCH):
                why = verdict[0] if verdict else status.value
                self.count("corrupt")
                self.count(f"corrupt.{why}")
                self._log.warn("chunk_corrupt", tier=self.name, why=why, key=chunk.key.hex())
                self.delete([chunk.key])
            done(status)

        def cancelled() -> None:
            self.count("cancelled")
            done(None)

        self._calls.start("get", Lane.LOAD, 1, run, answered, wanted=wanted, cancelled=cancelled)

    def store(self, chunk: HostChunk, done: Callable[[Status], None]) -> None:
        """Queue a write of the pinned, SEALED ``chunk`` until `start_stores`; ``done`` when its
        slot is the owner's again.

        Where the quota is full the put waits until older chunks are confirmed deleted, so
        the tier never holds more than ``size_bytes``.  Where the chunk itself is being deleted,
        such as one that was corrupt, it waits for that.
        """
        put = _Put(chunk, envelope.stored_bytes(chunk.payload_bytes), done)
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
            self._waiting.append(put)

    def start_stores(self) -> None:
        """Start the queued puts that fit, small chunks several a call; have older chunks deleted
        for the others, which start once that is confirmed."""
        batch: list[_Put] = []
        held: list[_Put] = []
        while self._waiting:
            put = self._waiting[0]
            if self._quota.is_leaving(put.chunk.key):
                held.append(self._waiting.popleft())
                continue
            if not self._quota.fits(put.nbytes):
                if self.available and put.nbytes <= self.config.size_bytes:
                    self._evict(sum(waiting.nbytes for waiting in self._waiting))
                    if self._quota.has_leaving:
                        break
                self._waiting.popleft()
                self.count("dropped_full")
                put.done(Status.REJECTED)
                continue
            self._waiting.popleft()
            self._quota.put_started(put.chunk.key, put.nbytes)
            batch.append(put)
            if sum(p.nbytes for p in batch) >= PUT_BYTES or len(batch) == self._max_batch:
                self._put(batch)
                batch = []
        self._waiting.extendleft(reversed(held))
        if batch:
            self._put(batch)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove ``keys`` in the background; their room is free once that is confirmed."""
        for start in range(0, len(keys), self._max_batch):
            batch = list(keys[start : start + self._max_batch])
            self._quota.delete_started(batch)
            self._calls.start(
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
        """Notice overdue calls; called in every poll."""
        self._calls.tick()

    def close(self, timeout_s: float) -> bool:
        """Close executor and connector, each within its limit; False when a call still runs."""
        return self._calls.close(timeout_s)

    def _not_known_absent(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the ``keys`` that the store did not lack a moment ago."""
        now_s = self._runtime.now_s()
        return [i for i, key in enumerate(keys) if self._absent.get(key, 0.0) <= now_s]

    def _note_absent(self, key: bytes) -> None:
        self._absent[key] = self._runtime.now_s() + self.config.negative_ttl_s
        self._absent.move_to_end(key)
        if len(self._absent) > self.config.max_negative_keys:
            self._absent.popitem(last=False)

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

    def _put(self, batch: list[_Put]) -> None:
        keys = [put.chunk.key for put in batch]

        def run(ctx: OpContext) -> list[Status]:
            sources = [self._sealed(put.chunk) for put in batch]
            return self.connector.put_from(keys, sources, ctx)

        def answered(statuses: list[Status]) -> None:
            for put, status in zip(batch, statuses):
                self._quota.put_ended(put.chunk.key, put.chunk.parent, ok=status is Status.OK)
                if status is Status.OK:
                    self._absent.pop(put.chunk.key, None)
                    self.on_change(put.chunk.key, True)
                    self.count("stored")
                    self.count("stored_bytes", put.nbytes)
            doubtful = [key for key, s in zip(keys, statuses) if s is not Status.OK]
            # The room stays taken until their delete is confirmed.
            self.delete(doubtful)
            for put, status in zip(batch, statuses):
                put.done(status)

        self._calls.start("put", Lane.STORE, len(batch), run, answered)

    def _sealed(self, chunk: HostChunk) -> Buffer:
        """The slot with its envelope's header, which the first tier that needs it writes."""
        slot = self._host.slot(chunk)
        with chunk.frame_lock:
            if not chunk.framed:
                envelope.seal(
                    slot,
                    key=chunk.key,
                    layout=chunk.layout.fingerprint,
                    payload_bytes=chunk.payload_bytes,
                )
                chunk.framed = True
        return self._buffer(chunk, slot.toreadonly())

    def _evict(self, nbytes: int) -> None:
        victims = self._quota.choose_victims(nbytes)
        if victims:
            self.count("evicted", len(victims))
            self.delete(victims)

    def _deleted(self, keys: Sequence[bytes], statuses: Sequence[Status]) -> None:
        gone = [key for key, status in zip(keys, statuses) if status is Status.OK]
        self._quota.delete_ended(keys, gone)
        for key in gone:
            self.on_change(key, False)
        if len(gone) < len(keys) and self._waiting:
            self.count("dropped_full")
            self._waiting.popleft().done(Status.REJECTED)
        self.start_stores()
