"""What each live request finds: its keys, its prefix on the way to host, and why chunks miss.

Called by the scheduler's thread; every method returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_core import tracing
from lmcache_core.cache import Cache
from lmcache_core.envelope import stored_bytes
from lmcache_core.integrations.vllm.geometry import Geometry
from lmcache_core.integrations.vllm.history import RequestHistory
from lmcache_core.integrations.vllm.identity import RequestIdentity
from lmcache_core.integrations.vllm.matches import Match
from lmcache_core.keys import ChunkHasher, Namespace
from lmcache_core.logs import logger
from lmcache_core.misses import MissLog

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_HASHERS = 4096
"""Tenants and adapters whose hasher is kept."""


@dataclass(slots=True)
class Tracked:
    """One live request.

    Attributes:
        keys: stored keys of its whole chunks so far, first kind; digests are computed once.
        match: its prefix on the way to host.
        ahead_bytes: host memory that the match may hold before the request's turn.
        asked_s: when it was asked about first; 0.0 before.
        noted: its lookup has been counted; a preempted request looks again.
        tail: key of the prompt's last chunk when that is not full and such are stored, with
            the tokens of the prompt that end with its last whole block.
        offered: chunks looked at for storing, from the start.
        frozen: caches nothing more (its pages predate a reset).
        exact: the prompt's last chunk counts to its last token, for another engine.
        elsewhere: it is computed by another engine: all of the prompt may be loaded.
        load_failed: a load failed, so it is prefilled and not offered another.
        cached_tokens: loaded for it, by tier.
        span: of its lookup, while that is traced.
    """

    request: Request
    hasher: ChunkHasher
    digests: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    match: Match | None = None
    ahead_bytes: int = 0
    asked_s: float = 0.0
    noted: bool = False
    tail: bytes | None = None
    tail_end: int = 0
    tail_offered: bool = False
    offered: int = 0
    parked: bool = False
    exact: bool = False
    elsewhere: bool = False
    frozen: bool = False
    load_failed: bool = False
    cached_tokens: dict[str, int] = field(default_factory=dict)
    span: tracing.Span = tracing.NO_SPAN


NewKeys = Callable[[Tracked, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watchers:
    """Who is told what lookups learn; each in the scheduler's thread.

    Attributes:
        keys: a request has more keys, from a number on.
        namespace: with its salt and its adapter's digest, when it is used first.
        saved: key of a request's first chunk, tokens that are loaded for it, chunks of its hit.
    """

    keys: NewKeys = lambda tracked, before: None
    namespace: Callable[[Namespace, str | None, str], None] = lambda namespace, salt, lora: None
    saved: Callable[[bytes, int, int], None] = lambda first_key, tokens, chunks: None


class Lookups:
    """The live requests by id.

    Args:
        namespace: of the engine.
        on_keys: told a request and its number of keys before, when it has new ones.

    Attributes:
        live: every request that may be cached.
    """

    def __init__(
        self,
        cache: Cache,
        namespace: Namespace,
        geometry: Geometry,
        *,
        watchers: Watchers | None = None,
        tracer: tracing.Tracer = tracing.NO_TRACER,
    ) -> None:
        self._cache = cache
        self._geometry = geometry
        self._chunk_size = geometry.chunk_size
        self._watchers = watchers or Watchers()
        self._tracer = tracer
        self._identity = RequestIdentity(namespace, on_new=self._watchers.namespace)
        self._misses = MissLog()
        self.history = RequestHistory(cache)
        self._hashers: dict[bytes, ChunkHasher] = {}
        self._refused: set[str] = set()
        self._ahead_bytes = 0
        self._max_ahead_bytes = cache.config.max_prefetch_bytes or cache.capacity_bytes // 4
        self._slot_bytes = sum(stored_bytes(k.layout.payload_bytes) for k in geometry.kinds)
        self._store_partial = cache.config.store_partial_chunk and geometry.hit_step < (
            geometry.chunk_size
        )
        self.live: dict[str, Tracked] = {}

    @property
    def waiting(self) -> bool:
        """Whether some request's prefix is still on its way."""
        return any(t.match is not None and not t.match.done for t in self.live.values())

    @property
    def ahead_bytes(self) -> int:
        """Host memory that prefixes of requests which wait for their turn may hold."""
        return self._ahead_bytes

    def track(self, request: Request) -> Tracked | None:
        """The live request; None when it may not be cached."""
        return self._track(request)

    def arrived(self, request: Request) -> None:
        """A request came: its prefix starts to move to host while it waits for its turn."""
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache or tracked.match is not None:
            return
        usable = self._usable(tracked)
        self.extend_keys(tracked)
        ahead_bytes = -(-usable // self._chunk_size) * self._slot_bytes
        if not usable or self._ahead_bytes + ahead_bytes > self._max_ahead_bytes:
            self._count("prefetch_not_ahead")
            return
        tracked.match = self._start(tracked, usable, 0)
        tracked.ahead_bytes = ahead_bytes
        self._ahead_bytes += ahead_bytes

    def matched(self, request: Request, computed: int) -> int | None:
        """How many tokens after ``computed`` are in host; None asks again later."""
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache:
            return 0
        if tracked.frozen or tracked.load_failed:
            return 0
        if not tracked.asked_s:
            tracked.asked_s = self._cache.now_s()
            if self._tracer.enabled:
                tracked.span = self._tracer.start(
                    "lmcache.lookup",
                    parent=request.trace_headers,
                    attributes={
                        tracing.REQUEST_ID: request.request_id,
                        tracing.PROMPT_TOKENS: request.num_tokens,
                    },
                )
        usable = self._usable(tracked)
        if computed >= usable:
            self.release(tracked)
            return 0
        self.extend_keys(tracked)
        match = tracked.match
        if match is None or not self._covers(match, computed):
            self.release(tracked)
            match = tracked.match = self._start(tracked, usable, computed)
        match.computed = computed
        if not match.done:
            return None
        end = tracked.tail_end if match.end > len(tracked.keys) else match.end * self._chunk_size
        matched = max(0, min(end, usable) - computed)
        if self._geometry.decode_only and computed + matched != request.num_tokens - 1:
            matched = 0
        if not tracked.noted:
            self._note_lookup(tracked, match, matched)
        if not matched:
            self.release(tracked)
        return matched

    def take(self, tracked: Tracked) -> Match:
        """The match, which is the caller's to release."""
        match, tracked.match = tracked.match, None
        assert match is not None
        self._ahead_bytes -= tracked.ahead_bytes
        tracked.ahead_bytes = 0
        return match

    def release(self, tracked: Tracked) -> None:
        """End the request's prefetch, if it has one."""
        if tracked.match is not None:
            self.take(tracked).release()

    def finished(self, request_id: str) -> Tracked | None:
        """The request ended or was aborted."""
        self._refused.discard(request_id)
        tracked = self.live.pop(request_id, None)
        if tracked is not None:
            tracked.span.end("aborted")
            self.release(tracked)
            self._cache.touch(tracked.keys)
        return tracked

    def reset(self, namespace: Namespace) -> None:
        """The engine has another namespace: what is live caches nothing more."""
        self._identity = RequestIdentity(namespace, on_new=self._watchers.namespace)
        for tracked in self.live.values():
            self.release(tracked)
            tracked.frozen = True

    def extend_keys(self, tracked: Tracked) -> None:
        """Keys of the chunks that the request has filled since the last call."""
        size, before = self._chunk_size, len(tracked.keys)
        whole = tracked.request.num_tokens // size
        if whole > before:
            tokens = tracked.request.all_token_ids[: whole * size]
            tracked.digests = tracked.hasher.extend(tracked.digests, tokens)
            tracked.keys += [self._key(tracked, digest) for digest in tracked.digests[before:]]
            self._watchers.keys(tracked, before)
        if self._store_partial or tracked.exact:
            self._find_tail(tracked)

    def note_hits(self, tracked: Tracked, match: Match, n: int) -> None:
        """``n`` tokens of ``match`` are being loaded."""
        tracked.cached_tokens = {}
        at, end = match.computed, match.computed + n
        for i in range(match.computed // self._chunk_size, match.end):
            upto = min((i + 1) * self._chunk_size, end)
            if upto > at:
                tier = match.sources.get(match.key(i), "host")
                tracked.cached_tokens[tier] = tracked.cached_tokens.get(tier, 0) + upto - at
                at = upto
        for tier, tokens in tracked.cached_tokens.items():
            self._count(f"hit_tokens.{tier}", tokens)
        if tracked.keys:
            self._watchers.saved(tracked.keys[0], n, match.end)

    def _key(self, tracked: Tracked, digest: bytes) -> bytes:
        return tracked.hasher.namespace.tag + digest + self._geometry.kinds[0].suffix

    def _track(self, request: Request) -> Tracked | None:
        req_id = request.request_id
        tracked = self.live.get(req_id)
        if tracked is None and req_id not in self._refused:
            namespace, reason = self._identity.of(request)
            if namespace is None:
                self._refused.add(req_id)
                self._count(f"not_cached.{reason}")
                logger.debug("not cached request_id=%s reason=%s", req_id, reason)
                return None
            tracked = Tracked(request, self._hasher(namespace))
            self.live[req_id] = tracked
            self._misses.saw(request.all_token_ids[: self._chunk_size], namespace)
        return tracked

    def _hasher(self, namespace: Namespace) -> ChunkHasher:
        if namespace.tag not in self._hashers:
            if len(self._hashers) >= MAX_HASHERS:
                self._hashers.clear()
            self._hashers[namespace.tag] = ChunkHasher(
                namespace,
                chunk_size=self._chunk_size,
                algorithm=self._cache.config.hash_algorithm,
            )
        return self._hashers[namespace.tag]

    def _find_tail(self, tracked: Tracked) -> None:
        prompt = tracked.request.num_prompt_tokens
        step = 1 if tracked.exact else self._geometry.hit_step
        whole, end = prompt // self._chunk_size, prompt // step * step
        if len(tracked.keys) > whole or end == whole * self._chunk_size:
            tracked.tail = None
        elif tracked.tail is None:
            tokens = tracked.request.all_token_ids[whole * self._chunk_size : end]
            previous = tracked.digests[-1] if whole else None
            tracked.tail = self._key(tracked, tracked.hasher.partial(previous, tokens))
            tracked.tail_end = end

    def _usable(self, tracked: Tracked) -> int:
        """Tokens that a load may bring: whole steps, and at least one is left to compute.  Of a
        prompt that another engine computes, all: vLLM computes the last token again.  Not of one
        token alone: with nothing before it vLLM would ask for it again, and again."""
        request = tracked.request
        all_of_it = tracked.elsewhere and tracked.exact and request.num_tokens > 1
        if all_of_it and request.num_tokens == request.num_prompt_tokens:
            return request.num_tokens
        return (request.num_tokens - 1) // self._geometry.hit_step * self._geometry.hit_step

    def _start(self, tracked: Tracked, usable: int, computed: int) -> Match:
        last = -(-usable // self._chunk_size)
        keys = tracked.keys[:last]
        if tracked.tail is not None and last > len(tracked.keys):
            keys.append(tracked.tail)
        first = computed // self._chunk_size
        return Match(self._cache, self._geometry, keys, first=first, computed=computed)

    def _covers(self, match: Match, computed: int) -> bool:
        """Whether the match will say what is there after ``computed`` tokens."""
        skipped = computed // self._chunk_size - match.first
        if len(self._geometry.kinds) > 1:
            # Its window was chosen for what the device had then.
            return computed == match.computed
        # A prefix that ended before says nothing about what the device does not need.
        return skipped == 0 or (
            skipped > 0 and (not match.done or match.end - match.first >= skipped)
        )

    def _note_lookup(self, tracked: Tracked, match: Match, matched: int) -> None:
        """Count what was asked for and, when chunks are missing, why the first of them is."""
        request = tracked.request
        tracked.noted = True
        self._count("requested_tokens", request.num_tokens)
        waited_s = self._cache.now_s() - tracked.asked_s
        self._cache.metrics.histogram("lookup_seconds").observe(waited_s)
        missing = match.asked - match.end
        reason = ""
        if missing > 0:
            first_chunk = request.all_token_ids[: self._chunk_size]
            reason = match.why_missed() or self._misses.explain(
                first_chunk, tracked.hasher.namespace
            )
            self._cache.metrics.counter(f"miss.{reason}").inc(missing)
        self.history.add(request.request_id, match, reason)
        tracked.span.set(tracing.HIT_TOKENS, matched)
        if reason:
            tracked.span.set(tracing.MISS_REASON, reason)
        tracked.span.end()
        logger.debug(
            "lookup request_id=%s tokens=%d hit_tokens=%d missed_chunks=%d reason=%s wait_s=%.4f",
            request.request_id, request.num_tokens, matched, missing, reason or "none", waited_s,
        )  # fmt: skip

    def _count(self, name: str, amount: int = 1) -> None:
        self._cache.metrics.counter(f"vllm.{name}").inc(amount)
