"""The scheduler's side: owns the engine, decides what is loaded and stored.

Every hook runs in the scheduler's thread and returns at once.  Bytes come to the host
tier before a hit is offered, so a load can't miss; a chunk counts as stored only after
every worker has confirmed its copy.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lmcache_core.engine import CacheEngine
from lmcache_core.integrations.vllm.lookups import Lookups, Tracked
from lmcache_core.integrations.vllm.metadata import (
    ArenaHandle,
    Job,
    Span,
    StepMetadata,
    WorkerMetadata,
)
from lmcache_core.logs import EventLog
from lmcache_core.metrics import Deltas, Recent
from lmcache_core.prefetch import Prefetch
from lmcache_core.tiers.host import HostChunk

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_core.integrations.vllm.events import KvEvents


class Scheduler:
    """Scheduler half of the connector.

    Args:
        engine: owned; closed by `close`.
        block_size: tokens in a block; divides the chunk size.
        events: collect KV cache events for `take_events`.
    """

    def __init__(self, engine: CacheEngine, *, block_size: int, events: bool = False) -> None:
        self._engine = engine
        self._block_size = block_size
        self._chunk_size = engine.config.chunk_size
        self._namespace = engine.namespace
        self._arena = ArenaHandle(engine.host.arena.ref, engine.host.arena)
        self._events = self._collect_events() if events else None
        self._lookups = Lookups(
            engine,
            block_size=block_size,
            on_keys=self._events.saw if self._events else lambda tracked, before: None,
        )
        self._deltas = Deltas(engine.metrics)
        self._log = EventLog(engine.now_s)
        self._job_ids = itertools.count(1)
        self._storing: dict[int, tuple[list[HostChunk], int]] = {}
        self._storing_bytes = 0
        self._distrusted: set[int] = set()
        self._loading: dict[int, tuple[str, Prefetch]] = {}
        self._new_loads: list[Job] = []
        self._running = 0

    def arrived(self, request: Request) -> None:
        """A request came: its prefix starts to move to host while it waits for its turn."""
        self._engine.poll()
        self._lookups.arrived(request)

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded; None asks again later."""
        self._engine.poll()
        matched = self._lookups.matched(request, computed)
        if not matched:
            return matched, False
        mode = self._engine.config.load
        tracked = self._lookups.live[request.request_id]
        tracked.parked = mode == "async" or (mode == "auto" and self._running > 0)
        return matched, tracked.parked

    def allocated(self, request: Request, blocks: KVCacheBlocks, matched: int) -> None:
        """Pages were given to the request: plan the load of ``matched`` tokens."""
        tracked = self._lookups.live.get(request.request_id)
        if tracked is None or tracked.ticket is None:
            return
        ticket, hits = self._lookups.take(tracked)
        if not matched:
            self._engine.release(ticket)
            return
        block_ids = blocks.get_block_ids()[0]
        first, count = tracked.computed // self._block_size, matched // self._block_size
        chunk = tracked.computed // self._chunk_size
        spans = self._spans(hits, chunk, block_ids, range(first, first + count))
        self._lookups.note_hits(tracked, ticket, hits, matched)
        job = Job(next(self._job_ids), request.request_id, tuple(spans), tracked.parked)
        self._loading[job.job_id] = (request.request_id, ticket)
        self._new_loads.append(job)

    def build_metadata(self, output: SchedulerOutput) -> StepMetadata:
        """What the workers move in this step, and which pages it may overwrite."""
        self._engine.poll()
        fence = self._overwritten(output) if self._storing else frozenset()
        meta = StepMetadata(self._arena, loads=self._new_loads, fence=fence)
        self._new_loads = []
        self._running = len(output.num_scheduled_tokens)
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        for req_id, scheduled in output.num_scheduled_tokens.items():
            job = self._plan_store(output, req_id, computed[req_id] + scheduled)
            if job is not None:
                meta.stores.append(job)
        if not output.total_num_scheduled_tokens and self._lookups.waiting:
            # An empty step would spin and keep the I/O threads from the interpreter.
            self._engine.runtime.wait(0.001)
        return meta

    def update(self, output: KVConnectorOutput) -> None:
        """Confirmations of the workers."""
        report = output.kv_connector_worker_meta
        if not isinstance(report, WorkerMetadata):
            return
        ended = report.done.keys() | report.failed.keys()
        for job_id in sorted(ended & self._loading.keys()):
            self._loaded(job_id, failed=report.failed.get(job_id, 0) > 0)
        for job_id in sorted(ended & self._storing.keys()):
            self._stored(job_id, failed=report.failed.get(job_id, 0) > 0)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """The request ended or was aborted; what its response says about us."""
        tracked = self._lookups.finished(request.request_id)
        if tracked is None:
            return None
        return {"lmcache": {"cached_tokens": dict(tracked.cached_tokens)}}

    def stats(self) -> Recent:
        """What was counted since the last call."""
        return self._deltas.take()

    def take_events(self) -> list[Any]:
        """KV cache events since the last call; empty unless they are collected."""
        return self._events.take() if self._events else []

    def has_pending_work(self) -> bool:
        """Whether an idle engine must go on stepping for confirmations to come in."""
        return bool(self._storing) or self._engine.settling

    def reset(self) -> bool:
        """Weights may have changed: forget host chunks, start a new epoch.

        Lower tiers keep what they have; nothing of it matches the new namespace.
        """
        self._engine.clear()
        self._engine.rebase(self._namespace.derive(weights_epoch=uuid.uuid4().hex))
        self._lookups.reset()
        if self._events:
            self._events.cleared()
        return True

    def close(self) -> None:
        """Flush and close the engine."""
        for tracked in self._lookups.live.values():
            self._lookups.release(tracked)
        self._engine.close()

    def _collect_events(self) -> KvEvents:
        from lmcache_core.integrations.vllm.events import KvEvents

        events = KvEvents(
            chunk_size=self._chunk_size,
            max_buffered=self._engine.config.max_buffered_events,
            dropped=self._engine.metrics.counter("vllm.events_dropped").inc,
        )
        self._engine.on_residency(events.changed)
        return events

    def _loaded(self, job_id: int, *, failed: bool) -> None:
        req_id, ticket = self._loading.pop(job_id)
        loaded = [chunk.key for chunk in ticket.hits()]
        self._engine.release(ticket)
        if not failed:
            return
        self._count("load_failed", len(loaded))
        self._engine.host.drop(loaded)
        # Steps since then may have computed on pages that were never filled.
        for store, (chunks, _) in self._storing.items():
            if store > job_id:
                self._distrusted.add(store)
                self._engine.host.drop(chunk.key for chunk in chunks)
        for tracked in self._lookups.live.values():
            tracked.offered, tracked.tail_offered = 0, False
            tracked.load_failed |= tracked.request.request_id == req_id

    def _stored(self, job_id: int, *, failed: bool) -> None:
        chunks, generation = self._storing.pop(job_id)
        self._storing_bytes -= len(chunks) * self._engine.layout.payload_bytes
        if failed or job_id in self._distrusted:
            self._distrusted.discard(job_id)
            self._engine.abort(chunks)
            self._count("store_failed", len(chunks))
        else:
            self._engine.commit(chunks, generation)
            self._count("stored_tokens", len(chunks) * self._chunk_size)

    def _spans(
        self, chunks: list[HostChunk], first_chunk: int, block_ids: list[int], blocks: range
    ) -> list[Span]:
        """Spans of the request's ``blocks``, which lie in ``chunks``."""
        per_chunk = self._chunk_size // self._block_size
        spans = []
        for i, chunk in enumerate(chunks, first_chunk):
            start = max(blocks.start, i * per_chunk)
            stop = min(blocks.stop, (i + 1) * per_chunk)
            if start < stop:
                ids = tuple(block_ids[start:stop])
                spans.append(Span(chunk.offset, start - i * per_chunk, ids))
        return spans

    def _plan_store(self, output: SchedulerOutput, req_id: str, processed: int) -> Job | None:
        tracked = self._lookups.live.get(req_id)
        if tracked is None or tracked.frozen:
            return None
        request = tracked.request
        known = request.num_tokens if self._engine.config.store_decode else 0
        bound = min(processed, max(known, request.num_prompt_tokens))
        limit = self._engine.config.max_pending_store_bytes
        chunks: list[HostChunk] = []
        ranges: list[range] = []
        for key, parent, blocks in self._to_store(tracked, bound):
            if self._storing_bytes + self._engine.layout.payload_bytes > limit:
                self._count("store_dropped_pressure")
                self._log.warn("store_dropped", request_id=req_id, reason="pressure")
                continue
            chunk = self._engine.reserve(key, parent)
            if chunk is not None:
                self._storing_bytes += self._engine.layout.payload_bytes
                chunks.append(chunk)
                ranges.append(blocks)
                if key == tracked.tail:
                    # What the slot held before must not reach a lower tier under this key.
                    self._engine.host.payload(chunk)[:] = 0
        if not chunks:
            return None
        table = self._block_ids(output, req_id)
        spans = tuple(
            Span(chunk.offset, 0, tuple(table[blocks.start : blocks.stop]))
            for chunk, blocks in zip(chunks, ranges)
        )
        job = Job(next(self._job_ids), req_id, spans)
        self._storing[job.job_id] = (chunks, self._engine.generation)
        return job

    def _to_store(
        self, tracked: Tracked, processed: int
    ) -> Iterator[tuple[bytes, bytes | None, range]]:
        """Key, parent and blocks of each chunk that is now full and not in host; a chunk
        that is still arriving is decided in a later step, since its fetch may yet fail."""
        whole = processed // self._chunk_size
        per_chunk = self._chunk_size // self._block_size
        tail_due = tracked.tail is not None and not tracked.tail_offered
        if whole <= tracked.offered and not (tail_due and processed >= tracked.tail_end):
            return
        self._lookups.extend_keys(tracked)
        for i in range(tracked.offered, whole):
            key = tracked.keys[i]
            if self._engine.is_arriving(key):
                return
            tracked.offered = i + 1
            if key not in self._engine.host:
                parent = tracked.keys[i - 1] if i else None
                yield key, parent, range(i * per_chunk, (i + 1) * per_chunk)
        tail = tracked.tail
        if tail is None or tracked.tail_offered or processed < tracked.tail_end:
            return
        if not self._engine.is_arriving(tail):
            tracked.tail_offered = True
            if tail not in self._engine.host:
                last = tracked.keys[-1] if tracked.keys else None
                yield tail, last, range(whole * per_chunk, tracked.tail_end // self._block_size)

    def _block_ids(self, output: SchedulerOutput, req_id: str) -> list[int]:
        state = output.kv_connector_block_state
        table = state.get_block_ids(req_id) if state is not None else None
        assert table is not None, f"no block table for the scheduled request {req_id}"
        return list(table[0])

    def _overwritten(self, output: SchedulerOutput) -> frozenset[int]:
        """Pages that this step or its loads may write."""
        ids: set[int] = set()
        for new in output.scheduled_new_reqs:
            ids.update(new.block_ids[0][new.num_computed_tokens // self._block_size :])
        for blocks in output.scheduled_cached_reqs.new_block_ids:
            if blocks is not None:
                ids.update(blocks[0])
        for copy in output.kv_cache_block_copies or ():
            ids.add(copy.dst_block_id)
        for job in self._new_loads:
            ids.update(b for span in job.spans for b in span.block_ids)
        return frozenset(ids)

    def _count(self, name: str, amount: int = 1) -> None:
        self._engine.metrics.counter(f"vllm.{name}").inc(amount)
