"""The scheduler's side: owns the engine, decides what is loaded and stored.

Every hook runs in the scheduler's thread and returns at once.  Bytes come to the host
tier before a hit is offered, so a load can't miss; a chunk counts as stored only after
every worker has confirmed its copy.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmcache_core.engine import CacheEngine
from lmcache_core.integrations.vllm.identity import RequestIdentity
from lmcache_core.integrations.vllm.metadata import (
    ArenaHandle,
    Job,
    Span,
    StepMetadata,
    WorkerMetadata,
)
from lmcache_core.keys import ChunkHasher
from lmcache_core.logs import logger
from lmcache_core.prefetch import Prefetch
from lmcache_core.tiers.host import HostChunk

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Tracked:
    """One live request.

    Attributes:
        keys: stored keys of its whole chunks so far; digests are computed once.
        ticket: its prefix on the way to host, from chunk ``first_chunk`` on.
        noted: its lookup has been counted; a preempted request looks again.
        ahead_bytes: host memory that the ticket may hold before the request's turn.
        computed: tokens that the device had when the request was asked about last.
        tail: key of the prompt's last chunk when that is not full and such are stored, with
            the tokens of the prompt that end with its last whole block.
        offered: chunks looked at for storing, from the start.
        frozen: caches nothing more (its pages predate a reset).
        load_failed: a load failed, so it is prefilled and not offered another.
    """

    request: Request
    hasher: ChunkHasher
    digests: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    ticket: Prefetch | None = None
    first_chunk: int = 0
    ahead_bytes: int = 0
    noted: bool = False
    computed: int = 0
    tail: bytes | None = None
    tail_end: int = 0
    tail_offered: bool = False
    offered: int = 0
    parked: bool = False
    frozen: bool = False
    load_failed: bool = False
    cached_tokens: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Scheduler half of the connector.

    Args:
        engine: owned; closed by `close`.
        block_size: tokens in a block; divides the chunk size.
    """

    def __init__(self, engine: CacheEngine, *, block_size: int) -> None:
        self._engine = engine
        self._block_size = block_size
        self._chunk_size = engine.config.chunk_size
        self._namespace = engine.namespace
        self._arena = ArenaHandle(engine.host.arena.ref, engine.host.arena)
        self._identity = RequestIdentity(engine.namespace)
        self._requests: dict[str, _Tracked] = {}
        self._refused: set[str] = set()
        self._job_ids = itertools.count(1)
        self._storing: dict[int, tuple[list[HostChunk], int]] = {}
        self._storing_bytes = 0
        self._distrusted: set[int] = set()
        self._loading: dict[int, tuple[str, Prefetch]] = {}
        self._new_loads: list[Job] = []
        self._running = 0
        self._ahead_bytes = 0
        self._max_ahead_bytes = engine.config.max_prefetch_bytes or engine.host.capacity_bytes // 4

    def arrived(self, request: Request) -> None:
        """A request came: its prefix starts to move to host while it waits for its turn."""
        self._engine.poll()
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache or tracked.ticket is not None:
            return
        usable = self._usable(request)
        self._extend_keys(tracked)
        ahead_bytes = -(-usable // self._chunk_size) * self._engine.slot_bytes
        if not usable or self._ahead_bytes + ahead_bytes > self._max_ahead_bytes:
            self._count("prefetch_not_ahead")
            return
        self._start(tracked, usable, 0)
        tracked.ahead_bytes = ahead_bytes
        self._ahead_bytes += ahead_bytes

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded; None asks again later."""
        self._engine.poll()
        tracked = self._track(request)
        usable = self._usable(request)
        if tracked is None or request.skip_reading_prefix_cache:
            return 0, False
        if tracked.frozen or tracked.load_failed:
            return 0, False
        if computed >= usable:
            self._release(tracked)
            return 0, False
        self._extend_keys(tracked)
        first = computed // self._chunk_size
        if not self._covers(tracked, first):
            self._release(tracked)
            self._start(tracked, usable, first)
        tracked.computed = computed
        assert tracked.ticket is not None
        if not tracked.ticket.done:
            return None, False
        hits = tracked.ticket.hits(first - tracked.first_chunk)
        count = first + len(hits)
        end = tracked.tail_end if count > len(tracked.keys) else count * self._chunk_size
        matched = max(0, min(end, usable) - computed)
        if not tracked.noted:
            self._note_lookup(tracked, count, matched)
        if not matched:
            self._release(tracked)
            return 0, False
        mode = self._engine.config.load
        tracked.parked = mode == "async" or (mode == "auto" and self._running > 0)
        return matched, tracked.parked

    def allocated(self, request: Request, blocks: KVCacheBlocks, matched: int) -> None:
        """Pages were given to the request: plan the load of ``matched`` tokens."""
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.ticket is None:
            return
        ticket = self._take(tracked)
        if not matched:
            self._engine.release(ticket)
            return
        block_ids = blocks.get_block_ids()[0]
        first, count = tracked.computed // self._block_size, matched // self._block_size
        chunk = tracked.computed // self._chunk_size
        hits = ticket.hits(chunk - tracked.first_chunk)
        spans = self._spans(hits, chunk, block_ids, range(first, first + count))
        self._note_hits(tracked, ticket, hits, matched)
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
        if not output.total_num_scheduled_tokens and self._waiting():
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
        self._refused.discard(request.request_id)
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return None
        self._release(tracked)
        self._engine.host.touch(tracked.keys)
        return {"lmcache": {"cached_tokens": dict(tracked.cached_tokens)}}

    def has_pending_work(self) -> bool:
        """Whether an idle engine must go on stepping for confirmations to come in."""
        return bool(self._storing) or self._engine.settling

    def reset(self) -> bool:
        """Weights may have changed: forget host chunks, start a new epoch.

        Lower tiers keep what they have; nothing of it matches the new namespace.
        """
        self._engine.clear()
        self._engine.rebase(self._namespace.derive(weights_epoch=uuid.uuid4().hex))
        self._identity = RequestIdentity(self._engine.namespace)
        for tracked in self._requests.values():
            self._release(tracked)
            tracked.frozen = True
        return True

    def close(self) -> None:
        """Flush and close the engine."""
        for tracked in self._requests.values():
            self._release(tracked)
        self._engine.close()

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
        for tracked in self._requests.values():
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

    def _track(self, request: Request) -> _Tracked | None:
        req_id = request.request_id
        tracked = self._requests.get(req_id)
        if tracked is None and req_id not in self._refused:
            namespace, reason = self._identity.of(request)
            if namespace is None:
                self._refused.add(req_id)
                self._count(f"not_cached.{reason}")
                return None
            tracked = _Tracked(request, self._engine.hasher(namespace))
            self._requests[req_id] = tracked
            self._engine.misses.saw(request.all_token_ids[: self._chunk_size], namespace)
        return tracked

    def _extend_keys(self, tracked: _Tracked) -> None:
        size = self._chunk_size
        whole = tracked.request.num_tokens // size
        if whole > len(tracked.keys):
            tokens = tracked.request.all_token_ids[: whole * size]
            tracked.digests = tracked.hasher.extend(tracked.digests, tokens)
            fresh = tracked.digests[len(tracked.keys) :]
            tracked.keys += self._engine.keys_of(fresh, tracked.hasher.namespace)
        if self._engine.config.store_partial_chunk:
            self._find_tail(tracked)

    def _find_tail(self, tracked: _Tracked) -> None:
        prompt = tracked.request.num_prompt_tokens
        whole, end = prompt // self._chunk_size, prompt // self._block_size * self._block_size
        if len(tracked.keys) > whole or end == whole * self._chunk_size:
            tracked.tail = None
        elif tracked.tail is None:
            tokens = tracked.request.all_token_ids[whole * self._chunk_size : end]
            previous = tracked.digests[-1] if whole else None
            digest = tracked.hasher.partial(previous, tokens)
            tracked.tail = self._engine.keys_of([digest], tracked.hasher.namespace)[0]
            tracked.tail_end = end

    def _usable(self, request: Request) -> int:
        """Tokens that a load may bring: whole blocks, and at least one is left to compute."""
        return (request.num_tokens - 1) // self._block_size * self._block_size

    def _start(self, tracked: _Tracked, usable: int, first: int) -> None:
        last = -(-usable // self._chunk_size)
        keys = tracked.keys[first:last]
        if tracked.tail is not None and last > len(tracked.keys):
            keys.append(tracked.tail)
        parent = tracked.keys[first - 1] if first else None
        tracked.ticket = self._engine.prefetch(keys, parent=parent)
        tracked.first_chunk = first

    def _covers(self, tracked: _Tracked, first: int) -> bool:
        """Whether the ticket will say what is there from chunk ``first`` on."""
        ticket, skipped = tracked.ticket, first - tracked.first_chunk
        if ticket is None or skipped < 0:
            return False
        # A prefix that ended before says nothing about what the device does not need.
        return not skipped or not ticket.done or len(ticket.hits()) >= skipped

    def _take(self, tracked: _Tracked) -> Prefetch:
        """The ticket, which is the caller's to release."""
        ticket, tracked.ticket = tracked.ticket, None
        assert ticket is not None
        self._ahead_bytes -= tracked.ahead_bytes
        tracked.ahead_bytes = 0
        return ticket

    def _release(self, tracked: _Tracked) -> None:
        if tracked.ticket is not None:
            self._engine.release(self._take(tracked))

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
        tracked = self._requests.get(req_id)
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
        self, tracked: _Tracked, processed: int
    ) -> Iterator[tuple[bytes, bytes | None, range]]:
        """Key, parent and blocks of each chunk that is now full and not in host; a chunk
        that is still arriving is decided in a later step, since its fetch may yet fail."""
        whole = processed // self._chunk_size
        per_chunk = self._chunk_size // self._block_size
        tail_due = tracked.tail is not None and not tracked.tail_offered
        if whole <= tracked.offered and not (tail_due and processed >= tracked.tail_end):
            return
        self._extend_keys(tracked)
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

    def _note_lookup(self, tracked: _Tracked, count: int, matched: int) -> None:
        """Count what was asked for and, when chunks are missing, why the first of them is."""
        request, ticket = tracked.request, tracked.ticket
        assert ticket is not None
        tracked.noted = True
        self._count("requested_tokens", request.num_tokens)
        position = count - tracked.first_chunk
        missing = len(ticket.keys) - position
        reason = ""
        if missing > 0:
            first_chunk = request.all_token_ids[: self._chunk_size]
            reason = ticket.why_missed(position) or self._engine.misses.explain(
                ticket.keys[position], first_chunk, tracked.hasher.namespace
            )
            self._engine.metrics.counter(f"miss.{reason}").inc(missing)
        logger.debug(
            "lookup request_id=%s tokens=%d hit_tokens=%d missed_chunks=%d reason=%s",
            request.request_id, request.num_tokens, matched, missing, reason or "none",
        )  # fmt: skip

    def _note_hits(
        self, tracked: _Tracked, ticket: Prefetch, hits: list[HostChunk], matched: int
    ) -> None:
        tracked.cached_tokens = {}
        at, end = tracked.computed, tracked.computed + matched
        for i, chunk in enumerate(hits, tracked.computed // self._chunk_size):
            upto = min((i + 1) * self._chunk_size, end)
            if upto > at:
                tier = ticket.sources.get(chunk.key, "host")
                tracked.cached_tokens[tier] = tracked.cached_tokens.get(tier, 0) + upto - at
                at = upto
        for tier, tokens in tracked.cached_tokens.items():
            self._count(f"hit_tokens.{tier}", tokens)

    def _waiting(self) -> bool:
        return any(t.ticket is not None and not t.ticket.done for t in self._requests.values())

    def _count(self, name: str, amount: int = 1) -> None:
        self._engine.metrics.counter(f"vllm.{name}").inc(amount)
