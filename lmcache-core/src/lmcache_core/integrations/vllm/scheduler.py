"""The scheduler's side: decides what is loaded and stored.

Every hook runs in the scheduler's thread and returns at once.  Bytes come to the host
tier before a hit is offered, so a load can't miss; a chunk counts as stored only after
every worker has confirmed its copy.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lmcache_core import tracing
from lmcache_core.agent.agent import Agent
from lmcache_core.agent.wire import MissRow, NamespaceNote, tenant_id
from lmcache_core.cache import Cache
from lmcache_core.integrations.vllm.disaggregation import Disaggregation
from lmcache_core.integrations.vllm.geometry import Geometry
from lmcache_core.integrations.vllm.lookups import Lookups, Tracked, Watchers
from lmcache_core.integrations.vllm.matches import Match
from lmcache_core.integrations.vllm.metadata import Job, Span, StepMetadata, WorkerMetadata
from lmcache_core.integrations.vllm.stores import BlockTables, Stores
from lmcache_core.keys import Namespace
from lmcache_core.metrics import Deltas, Recent

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from lmcache_core.integrations.vllm.events import KvEvents

IDLE_WAIT_S = 0.001

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _owned(method: _Method) -> _Method:
    """Have the caller be the cache's owner: the agent's thread is, while the engine is idle."""

    @functools.wraps(method)
    def owned(self: Scheduler, *args: Any) -> Any:
        with self.cache.owner:
            return method(self, *args)

    return cast(_Method, owned)


class Scheduler:
    """Scheduler half of the connector.

    Args:
        cache: owned; closed by `close`.
        namespace: of the engine.
        events: collect KV cache events for `take_events`.
        disaggregation: prompts that go to or come from other engines; None without a channel.
        agent: tells controllers; owned, started here.
        tracer: of lookups, loads and stores.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        namespace: Namespace,
        geometry: Geometry,
        events: bool = False,
        disaggregation: Disaggregation | None = None,
        agent: Agent | None = None,
        tracer: tracing.Tracer = tracing.NO_TRACER,
    ) -> None:
        self.cache = cache
        self._namespace = namespace
        self._geometry = geometry
        self._events = self._collect_events() if events else None
        self._agent = agent
        self._lookups = Lookups(
            cache, namespace, geometry, watchers=self._watchers(), tracer=tracer
        )
        self._deltas = Deltas(cache.metrics)
        self._job_id: Callable[[], int] = partial(next, itertools.count(1))
        self._stores = Stores(cache, geometry, self._lookups, self._job_id, tracer=tracer)
        self._tracer = tracer
        self._transfers = disaggregation or Disaggregation(
            cache, None, geometry, may_prefill=False, may_decode=False
        )
        self._loading: dict[int, tuple[str, Match, tracing.Span]] = {}
        self._new_loads: list[Job] = []
        self._reports = WorkerMetadata()
        self._running: set[str] = set()
        if agent is not None:
            agent.start()

    @_owned
    def arrived(self, request: Request) -> None:
        """A request came: its prefix starts to move to host while it waits for its turn."""
        self.cache.poll()
        wish = self._transfers.wish(request)
        tracked = self._lookups.track(request) if wish is not None else None
        if wish is not None and tracked is not None:
            tracked.exact = self._transfers.exact_tail
            tracked.elsewhere = not wish.prefill
            self._lookups.extend_keys(tracked)
            self._transfers.start(tracked, wish)
        if not self._transfers.expects(request.request_id):
            self._lookups.arrived(request)

    @_owned
    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens after ``computed`` can be loaded; None asks again later."""
        self.cache.poll()
        if self._transfers.waits(request.request_id):
            return None, False
        matched = self._lookups.matched(request, computed)
        if matched == 0:
            self._transfers.taken(request.request_id)
        if not matched:
            return matched, False
        mode = self.cache.config.load
        tracked = self._lookups.live[request.request_id]
        tracked.parked = mode == "async" or (mode == "auto" and bool(self._running))
        tracked.parked |= self._transfers.expects(request.request_id)
        if len(self._geometry.groups) > 1:
            # Only a parked load can be reported as failed when there are several block tables.
            tracked.parked = True
        return matched, tracked.parked

    @_owned
    def allocated(self, request: Request, blocks: KVCacheBlocks, matched: int) -> None:
        """Pages were given to the request: plan the load of ``matched`` tokens."""
        tracked = self._lookups.live.get(request.request_id)
        if tracked is None or tracked.match is None:
            return
        match = self._lookups.take(tracked)
        self._transfers.taken(request.request_id)
        if not matched:
            match.release()
            return
        spans = self._load_spans(match, blocks.get_block_ids(), match.computed + matched)
        self._lookups.note_hits(tracked, match, matched)
        # They are in host, or were a moment ago: not to be asked about again.
        tracked.offered = max(tracked.offered, min(match.end, len(tracked.keys)))
        job = Job(self._job_id(), request.request_id, tuple(spans), tracked.parked)
        self._loading[job.job_id] = (request.request_id, match, self._load_span(tracked, matched))
        self._new_loads.append(job)

    @_owned
    def build_metadata(self, output: SchedulerOutput) -> StepMetadata:
        """What the workers move in this step, and which pages it may overwrite."""
        self.cache.poll()
        fence = self._overwritten(output) if self._stores else frozenset()
        processed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        processed.update(zip(cached.req_ids, cached.num_computed_tokens))
        for req_id, scheduled in output.num_scheduled_tokens.items():
            processed[req_id] += scheduled
        stores = self._stores.plan(processed, lambda req_id: _tables(output, req_id))
        meta = StepMetadata(
            self.cache.handle,
            loads=self._new_loads,
            stores=stores,
            fence=fence,
            await_stores=self._transfers.pushing,
        )
        self._new_loads = []
        self._running = set(output.num_scheduled_tokens)
        if not output.total_num_scheduled_tokens and (
            self._lookups.waiting or self._transfers.busy
        ):
            # An empty step would spin and keep the I/O threads from the interpreter.
            self.cache.wait(IDLE_WAIT_S)
        return meta

    @_owned
    def update(self, output: KVConnectorOutput) -> None:
        """Confirmations of the workers."""
        report = output.kv_connector_worker_meta
        if not isinstance(report, WorkerMetadata):
            return
        self._reports = self._reports.aggregate(report)
        for job_id in sorted(self._reports.jobs):
            done, failed = self._reports.ended(job_id)
            if done + failed < self._geometry.workers:
                continue
            self._reports.forget(job_id)
            if job_id in self._loading:
                self._loaded(job_id, failed=failed > 0)
            elif job_id in self._stores:
                self._stores.confirmed(job_id, failed=failed > 0)

    @_owned
    def finished(self, request: Request) -> dict[str, Any] | None:
        """The request ended or was aborted; what its response says about us."""
        self._running.discard(request.request_id)
        self.cache.poll()
        transfer = self._transfers.finished(request.request_id)
        tracked = self._lookups.finished(request.request_id)
        if tracked is None:
            return None
        told: dict[str, Any] = {"cached_tokens": dict(tracked.cached_tokens)}
        if transfer is not None:
            told["transfer"] = transfer
        return {"lmcache": told}

    @_owned
    def stats(self) -> Recent:
        """What was counted since the last call."""
        return self._deltas.take()

    @_owned
    def take_events(self) -> list[Any]:
        """KV cache events since the last call; empty unless they are collected."""
        return self._events.take() if self._events else []

    @_owned
    def has_pending_work(self) -> bool:
        """Whether an idle engine must go on stepping for confirmations to come in."""
        return bool(self._stores) or self.cache.settling

    @_owned
    def reset(self) -> bool:
        """Weights may have changed: nothing stored before is served, a new epoch starts.

        Lower tiers keep what they have; nothing of it matches the new namespace.
        """
        self._transfers.reset()
        self.cache.reset()
        self._lookups.reset(self._namespace.derive(weights_epoch=uuid.uuid4().hex))
        if self._events:
            self._events.cleared()
        return True

    def explain(self, request_id: str) -> list[MissRow] | None:
        """See `RequestHistory.explain`; the owner's lock is held."""
        return self._lookups.history.explain(request_id)

    def close(self) -> None:
        """Flush and close the cache."""
        if self._agent is not None:
            # Its thread takes turns as the owner: not while it is waited for.
            self._agent.close()
        with self.cache.owner:
            self._close()

    def _close(self) -> None:
        for tracked in self._lookups.live.values():
            self._lookups.release(tracked)
        for _, match, span in self._loading.values():
            match.release()
            span.end("closed")
        self.cache.close()

    def _watchers(self) -> Watchers:
        keys = self._events.saw if self._events else lambda tracked, before: None
        agent = self._agent
        if agent is None:
            return Watchers(keys=keys)
        base = self._namespace.tag

        def namespace(used: Namespace, salt: str | None, lora: str) -> None:
            agent.saw_namespace(NamespaceNote(used.tag, base, tenant_id(salt), lora))

        return Watchers(keys=keys, namespace=namespace, saved=agent.saved)

    def _collect_events(self) -> KvEvents:
        from lmcache_core.integrations.vllm.events import KvEvents

        events = KvEvents(
            chunk_size=self._geometry.chunk_size,
            max_buffered=self.cache.config.max_buffered_events,
            dropped=self.cache.metrics.counter("vllm.events_dropped").inc,
        )
        self.cache.on_residency(events.changed)
        return events

    def _loaded(self, job_id: int, *, failed: bool) -> None:
        req_id, match, span = self._loading.pop(job_id)
        loaded = match.keys
        match.release()
        span.end("load_failed" if failed else "")
        if not failed:
            return
        self.cache.metrics.counter("vllm.load_failed").inc(len(loaded))
        self.cache.forget(loaded)
        self._stores.distrust_after(job_id)
        for tracked in self._lookups.live.values():
            tracked.offered, tracked.tail_offered = 0, False
            tracked.load_failed |= tracked.request.request_id == req_id

    def _load_span(self, tracked: Tracked, tokens: int) -> tracing.Span:
        if not self._tracer.enabled:
            return tracing.NO_SPAN
        return self._tracer.start(
            "lmcache.retrieve",
            parent=tracked.request.trace_headers,
            attributes={
                tracing.REQUEST_ID: tracked.request.request_id,
                tracing.HIT_TOKENS: tokens,
                tracing.TIERS: sorted(tracked.cached_tokens),
            },
        )

    def _load_spans(self, match: Match, tables: BlockTables, end: int) -> list[Span]:
        """Spans of the pages between what the device has and token ``end``; pages that lie
        before a window are not there and stay so."""
        spans = []
        for number, kind in enumerate(self._geometry.kinds):
            for chunk, slot in match.slots(number):
                for group, at in zip(kind.groups, kind.offsets):
                    stored = group.stored_range(chunk)
                    start = max(stored.start, match.computed // group.block_size)
                    stop = min(stored.stop, -(-end // group.block_size))
                    table = tables[group.index]
                    if group.window is not None:
                        start = next((i for i in range(start, stop) if table[i]), stop)
                    if start < stop:
                        ids = tuple(table[start:stop])
                        spans.append(Span(slot.offset, at, group.index, start - stored.start, ids))
        return spans

    def _overwritten(self, output: SchedulerOutput) -> frozenset[int]:
        """Pages that this step or its loads may write."""
        ids: set[int] = set()
        for new in output.scheduled_new_reqs:
            for group in self._geometry.groups:
                start = new.num_computed_tokens // group.block_size
                ids.update(new.block_ids[group.index][start:])
        for blocks in output.scheduled_cached_reqs.new_block_ids:
            for table in blocks or ():
                ids.update(table)
        for copy in output.kv_cache_block_copies or ():
            ids.add(copy.dst_block_id)
        for job in self._new_loads:
            ids.update(b for span in job.spans for b in span.block_ids)
        return frozenset(ids)


def _tables(output: SchedulerOutput, req_id: str) -> BlockTables:
    state = output.kv_connector_block_state
    tables = state.get_block_ids(req_id) if state is not None else None
    assert tables is not None, f"no block table for the scheduled request {req_id}"
    return tables
