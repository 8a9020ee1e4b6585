"""What each step stores: full chunks whose pages this step completes, until they are confirmed.

Called by the scheduler's thread; asks the cache once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmcache_core import tracing
from lmcache_core.cache import Cache, Refusal, Slot, Wanted
from lmcache_core.integrations.vllm.geometry import Geometry, Kind
from lmcache_core.integrations.vllm.lookups import Lookups, Tracked
from lmcache_core.integrations.vllm.metadata import Job, Span
from lmcache_core.logs import EventLog

BlockTables = Sequence[Sequence[int]]
"""Block ids of a request, by group."""


class _Candidate(NamedTuple):
    """A chunk that is full now: where its pages are, and what to do when it is looked at again."""

    tracked: Tracked
    chunk: int
    kind: int
    wanted: Wanted
    tables: BlockTables
    tail: bool


@dataclass(slots=True)
class _Storing:
    """A job that workers have not all confirmed."""

    slots: list[Slot]
    nbytes: int
    span: tracing.Span
    distrusted: bool = False


class Stores:
    """Jobs that move pages into slots.

    Args:
        job_id: gives the next number.
    """

    def __init__(
        self,
        cache: Cache,
        geometry: Geometry,
        lookups: Lookups,
        job_id: Callable[[], int],
        *,
        tracer: tracing.Tracer = tracing.NO_TRACER,
    ) -> None:
        self._tracer = tracer
        self._cache = cache
        self._geometry = geometry
        self._chunk_size = geometry.chunk_size
        self._lookups = lookups
        self._job_id = job_id
        self._log = EventLog(cache.now_s)
        self._storing: dict[int, _Storing] = {}
        self._pending_bytes = 0

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._storing

    def __bool__(self) -> bool:
        """Whether some job is not confirmed."""
        return bool(self._storing)

    def plan(self, processed: dict[str, int], tables: Callable[[str], BlockTables]) -> list[Job]:
        """Jobs of a step.

        Args:
            processed: request -> tokens whose pages are filled when the step ends.
            tables: the block tables of a scheduled request.
        """
        candidates: list[_Candidate] = []
        for req_id, tokens in processed.items():
            tracked = self._lookups.live.get(req_id)
            if tracked is not None and not tracked.frozen:
                candidates += self._candidates(tracked, tokens, tables)
        candidates = self._within_limit(candidates)
        if not candidates:
            return []
        answers = self._cache.reserve([one.wanted for one in candidates])
        jobs: dict[str, tuple[list[Slot], list[Span], int]] = {}
        for candidate, answer in zip(candidates, answers):
            if answer is Refusal.ARRIVING:
                self._ask_again(candidate)
            elif not isinstance(answer, Refusal):
                req_id = candidate.tracked.request.request_id
                slots, spans, nbytes = jobs.get(req_id, ([], [], 0))
                slots.append(answer)
                spans += self._spans(candidate, answer)
                nbytes += self._kind(candidate).layout.payload_bytes
                jobs[req_id] = (slots, spans, nbytes)
        return [self._start(req_id, *job) for req_id, job in jobs.items()]

    def confirmed(self, job_id: int, *, failed: bool) -> None:
        """Every worker has answered."""
        job = self._storing.pop(job_id)
        self._pending_bytes -= job.nbytes
        if failed or job.distrusted:
            self._cache.abort(job.slots)
            self._count("store_failed", len(job.slots))
            job.span.end("store_failed")
            return
        self._cache.commit(job.slots)
        first = self._geometry.kinds[0].suffix
        chunks = sum(slot.key.endswith(first) for slot in job.slots)
        self._count("stored_tokens", chunks * self._chunk_size)
        job.span.set(tracing.STORED_TOKENS, chunks * self._chunk_size)
        job.span.end()

    def distrust_after(self, job_id: int) -> None:
        """A load failed: later steps may have computed on pages that were never filled."""
        for number, job in self._storing.items():
            if number > job_id:
                job.distrusted = True
                self._cache.forget([slot.key for slot in job.slots])

    def _candidates(
        self, tracked: Tracked, processed: int, tables: Callable[[str], BlockTables]
    ) -> Iterator[_Candidate]:
        """Chunks that are full and were not looked at."""
        request = tracked.request
        known = request.num_tokens if self._cache.config.store_decode else 0
        bound = min(processed, max(known, request.num_prompt_tokens))
        whole = bound // self._chunk_size
        tail_due = tracked.tail is not None and not tracked.tail_offered
        tail_due = tail_due and bound >= tracked.tail_end
        if whole <= tracked.offered and not tail_due:
            return
        self._lookups.extend_keys(tracked)
        table = tables(request.request_id)
        for chunk in range(tracked.offered, whole):
            tracked.offered = chunk + 1
            for number, kind in enumerate(self._geometry.kinds):
                if self._has_pages(kind, chunk, table):
                    wanted = self._wanted(tracked, chunk, number)
                    yield _Candidate(tracked, chunk, number, wanted, table, False)
        if tail_due and tracked.tail is not None and bound >= tracked.tail_end:
            tracked.tail_offered = True
            # Its slot has room for more than its blocks.
            wanted = Wanted(tracked.tail, tracked.keys[-1] if tracked.keys else None, 0, True)
            yield _Candidate(tracked, whole, 0, wanted, table, True)

    def _wanted(self, tracked: Tracked, chunk: int, kind: int) -> Wanted:
        key = self._geometry.key(tracked.keys[chunk], kind)
        parent = self._geometry.key(tracked.keys[chunk - 1], kind) if chunk else None
        return Wanted(key, parent, kind, self._geometry.padded)

    def _has_pages(self, kind: Kind, chunk: int, tables: BlockTables) -> bool:
        """Whether every page is there; those that left a window are not."""
        return all(
            group.window is None or all(tables[group.index][i] for i in group.stored_range(chunk))
            for group in kind.groups
        )

    def _within_limit(self, candidates: list[_Candidate]) -> list[_Candidate]:
        limit = self._cache.config.max_pending_store_bytes
        taken: list[_Candidate] = []
        nbytes = self._pending_bytes
        for candidate in candidates:
            nbytes += self._kind(candidate).layout.payload_bytes
            if nbytes <= limit:
                taken.append(candidate)
        if dropped := len(candidates) - len(taken):
            req_id = candidates[-1].tracked.request.request_id
            self._count("store_dropped_pressure", dropped)
            self._log.warn("store_dropped", request_id=req_id, reason="pressure")
        return taken

    def _ask_again(self, candidate: _Candidate) -> None:
        """It is still arriving: decided in a later step, since its fetch may yet fail."""
        if candidate.tail:
            candidate.tracked.tail_offered = False
        else:
            candidate.tracked.offered = min(candidate.tracked.offered, candidate.chunk)

    def _spans(self, candidate: _Candidate, slot: Slot) -> Iterator[Span]:
        kind = self._kind(candidate)
        for group, at in zip(kind.groups, kind.offsets):
            blocks = group.stored_range(candidate.chunk)
            if candidate.tail:
                end = -(-candidate.tracked.tail_end // group.block_size)
                blocks = range(blocks.start, end)
            ids = candidate.tables[group.index][blocks.start : blocks.stop]
            yield Span(slot.offset, at, group.index, 0, tuple(ids))

    def _start(self, req_id: str, slots: list[Slot], spans: list[Span], nbytes: int) -> Job:
        job = Job(self._job_id(), req_id, tuple(spans))
        span = tracing.NO_SPAN
        if self._tracer.enabled:
            span = self._tracer.start(
                "lmcache.store",
                parent=self._lookups.live[req_id].request.trace_headers,
                attributes={tracing.REQUEST_ID: req_id, tracing.SIZE_BYTES: nbytes},
            )
        self._storing[job.job_id] = _Storing(slots, nbytes, span)
        self._pending_bytes += nbytes
        return job

    def _kind(self, candidate: _Candidate) -> Kind:
        return self._geometry.kinds[candidate.kind]

    def _count(self, name: str, amount: int = 1) -> None:
        self._cache.metrics.counter(f"vllm.{name}").inc(amount)
