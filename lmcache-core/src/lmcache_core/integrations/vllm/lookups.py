"""What each live request finds: its keys, its prefix on the way to host, and why chunks miss.

Called by the scheduler's thread; every method returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_core.engine import CacheEngine
from lmcache_core.integrations.vllm.identity import RequestIdentity
from lmcache_core.keys import ChunkHasher
from lmcache_core.logs import logger
from lmcache_core.prefetch import Prefetch
from lmcache_core.tiers.host import HostChunk

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Tracked:
    """One live request.

    Attributes:
        keys: stored keys of its whole chunks so far; digests are computed once.
        ticket: its prefix on the way to host, from chunk ``first_chunk`` on.
        ahead_bytes: host memory that the ticket may hold before the request's turn.
        computed: tokens that the device had when the request was asked about last.
        asked_s: when it was asked about first; 0.0 before.
        noted: its lookup has been counted; a preempted request looks again.
        tail: key of the prompt's last chunk when that is not full and such are stored, with
            the tokens of the prompt that end with its last whole block.
        offered: chunks looked at for storing, from the start.
        frozen: caches nothing more (its pages predate a reset).
        load_failed: a load failed, so it is prefilled and not offered another.
        cached_tokens: loaded for it, by tier.
    """

    request: Request
    hasher: ChunkHasher
    digests: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    ticket: Prefetch | None = None
    first_chunk: int = 0
    ahead_bytes: int = 0
    computed: int = 0
    asked_s: float = 0.0
    noted: bool = False
    tail: bytes | None = None
    tail_end: int = 0
    tail_offered: bool = False
    offered: int = 0
    parked: bool = False
    frozen: bool = False
    load_failed: bool = False
    cached_tokens: dict[str, int] = field(default_factory=dict)


NewKeys = Callable[[Tracked, int], None]


class Lookups:
    """The live requests by id.

    Args:
        block_size: tokens in a block; divides the chunk size.
        on_keys: told a request and its number of keys before, when it has new ones.

    Attributes:
        live: every request that may be cached.
    """

    def __init__(
        self,
        engine: CacheEngine,
        *,
        block_size: int,
        on_keys: NewKeys = lambda tracked, before: None,
    ) -> None:
        self._engine = engine
        self._block_size = block_size
        self._chunk_size = engine.config.chunk_size
        self._on_keys = on_keys
        self._identity = RequestIdentity(engine.namespace)
        self._refused: set[str] = set()
        self._ahead_bytes = 0
        self._max_ahead_bytes = engine.config.max_prefetch_bytes or engine.host.capacity_bytes // 4
        self.live: dict[str, Tracked] = {}

    @property
    def waiting(self) -> bool:
        """Whether some request's prefix is still on its way."""
        return any(t.ticket is not None and not t.ticket.done for t in self.live.values())

    @property
    def ahead_bytes(self) -> int:
        """Host memory that prefixes of requests which wait for their turn may hold."""
        return self._ahead_bytes

    def arrived(self, request: Request) -> None:
        """A request came: its prefix starts to move to host while it waits for its turn."""
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache or tracked.ticket is not None:
            return
        usable = self._usable(request)
        self.extend_keys(tracked)
        ahead_bytes = -(-usable // self._chunk_size) * self._engine.slot_bytes
        if not usable or self._ahead_bytes + ahead_bytes > self._max_ahead_bytes:
            self._count("prefetch_not_ahead")
            return
        self._start(tracked, usable, 0)
        tracked.ahead_bytes = ahead_bytes
        self._ahead_bytes += ahead_bytes

    def matched(self, request: Request, computed: int) -> int | None:
        """How many tokens after ``computed`` are in host; None asks again later."""
        tracked = self._track(request)
        if tracked is None or request.skip_reading_prefix_cache:
            return 0
        if tracked.frozen or tracked.load_failed:
            return 0
        tracked.asked_s = tracked.asked_s or self._engine.now_s()
        usable = self._usable(request)
        if computed >= usable:
            self.release(tracked)
            return 0
        self.extend_keys(tracked)
        first = computed // self._chunk_size
        if not self._covers(tracked, first):
            self.release(tracked)
            self._start(tracked, usable, first)
        tracked.computed = computed
        assert tracked.ticket is not None
        if not tracked.ticket.done:
            return None
        count = first + len(tracked.ticket.hits(first - tracked.first_chunk))
        end = tracked.tail_end if count > len(tracked.keys) else count * self._chunk_size
        matched = max(0, min(end, usable) - computed)
        if not tracked.noted:
            self._note_lookup(tracked, count, matched)
        if not matched:
            self.release(tracked)
        return matched

    def take(self, tracked: Tracked) -> tuple[Prefetch, list[HostChunk]]:
        """The ticket, which is the caller's to release, and the chunks after what the device
        has, pinned by it."""
        ticket, tracked.ticket = tracked.ticket, None
        assert ticket is not None
        self._ahead_bytes -= tracked.ahead_bytes
        tracked.ahead_bytes = 0
        skipped = tracked.computed // self._chunk_size - tracked.first_chunk
        return ticket, ticket.hits(max(0, skipped))

    def release(self, tracked: Tracked) -> None:
        """End the request's prefetch, if it has one."""
        if tracked.ticket is not None:
            self._engine.release(self.take(tracked)[0])

    def finished(self, request_id: str) -> Tracked | None:
        """The request ended or was aborted."""
        self._refused.discard(request_id)
        tracked = self.live.pop(request_id, None)
        if tracked is not None:
            self.release(tracked)
            self._engine.host.touch(tracked.keys)
        return tracked

    def reset(self) -> None:
        """The engine has another namespace: what is live caches nothing more."""
        self._identity = RequestIdentity(self._engine.namespace)
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
            fresh = tracked.digests[before:]
            tracked.keys += self._engine.keys_of(fresh, tracked.hasher.namespace)
            self._on_keys(tracked, before)
        if self._engine.config.store_partial_chunk:
            self._find_tail(tracked)

    def note_hits(self, tracked: Tracked, ticket: Prefetch, hits: list[HostChunk], n: int) -> None:
        """``n`` tokens of ``hits`` are being loaded."""
        tracked.cached_tokens = {}
        at, end = tracked.computed, tracked.computed + n
        for i, chunk in enumerate(hits, tracked.computed // self._chunk_size):
            upto = min((i + 1) * self._chunk_size, end)
            if upto > at:
                tier = ticket.sources.get(chunk.key, "host")
                tracked.cached_tokens[tier] = tracked.cached_tokens.get(tier, 0) + upto - at
                at = upto
        for tier, tokens in tracked.cached_tokens.items():
            self._count(f"hit_tokens.{tier}", tokens)

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
            tracked = Tracked(request, self._engine.hasher(namespace))
            self.live[req_id] = tracked
            self._engine.misses.saw(request.all_token_ids[: self._chunk_size], namespace)
        return tracked

    def _find_tail(self, tracked: Tracked) -> None:
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

    def _start(self, tracked: Tracked, usable: int, first: int) -> None:
        last = -(-usable // self._chunk_size)
        keys = tracked.keys[first:last]
        if tracked.tail is not None and last > len(tracked.keys):
            keys.append(tracked.tail)
        parent = tracked.keys[first - 1] if first else None
        tracked.ticket = self._engine.prefetch(keys, parent=parent)
        tracked.first_chunk = first

    def _covers(self, tracked: Tracked, first: int) -> bool:
        """Whether the ticket will say what is there from chunk ``first`` on."""
        ticket, skipped = tracked.ticket, first - tracked.first_chunk
        if ticket is None or skipped < 0:
            return False
        # A prefix that ended before says nothing about what the device does not need.
        return not skipped or not ticket.done or len(ticket.hits()) >= skipped

    def _note_lookup(self, tracked: Tracked, count: int, matched: int) -> None:
        """Count what was asked for and, when chunks are missing, why the first of them is."""
        request, ticket = tracked.request, tracked.ticket
        assert ticket is not None
        tracked.noted = True
        self._count("requested_tokens", request.num_tokens)
        waited_s = self._engine.now_s() - tracked.asked_s
        self._engine.metrics.histogram("lookup_seconds").observe(waited_s)
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
            "lookup request_id=%s tokens=%d hit_tokens=%d missed_chunks=%d reason=%s wait_s=%.4f",
            request.request_id, request.num_tokens, matched, missing, reason or "none", waited_s,
        )  # fmt: skip

    def _count(self, name: str, amount: int = 1) -> None:
        self._engine.metrics.counter(f"vllm.{name}").inc(amount)
