"""Writes of one tier: queued, encoded, put in batches, settled."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lmcache_core.envelope import HEADER_BYTES, stored_bytes
from lmcache_core.policy.codec_choice import AS_IS, Way
from lmcache_core.sdk import Buffer, OpContext, Status
from lmcache_core.tiers.framing import frame
from lmcache_core.tiers.host import HostChunk
from lmcache_core.tiers.staging import Staging
from lmcache_core.tiers.work import Parts, TierWork
from lmcache_core.transfer.executor import Lane

PUT_BYTES = 4 << 20
"""Chunks are put together until they have so many bytes."""
MAX_BATCH = 128


class _Put(NamedTuple):
    """A chunk to store; ``nbytes`` is the most that it can take there.

    A rewrite (``way`` is given) replaces the stored bytes of the same chunk.
    """

    chunk: HostChunk
    nbytes: int
    done: Callable[[Status], None]
    way: Way | None


@dataclass(slots=True)
class _Staged:
    """A put on its way: where its encoded bytes go, and how many bytes are stored."""

    put: _Put
    slot: HostChunk | None
    nbytes: int
    encoded: bool = False


class Puts(TierWork):
    """Of one tier.  Owner thread only, except inside its own jobs."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._staging = Staging(self._host, self._tier.config.max_staging_bytes)
        self._waiting: deque[_Put] = deque()
        self._waiting_keys: Counter[bytes] = Counter()

    def __contains__(self, key: bytes) -> bool:
        """Whether a put of ``key`` waits to be started."""
        return key in self._waiting_keys

    def add(self, chunk: HostChunk, done: Callable[[Status], None], way: Way | None = None) -> None:
        """Queue a put of ``chunk``, whose bytes stay as they are until ``done``."""
        if len(self._waiting) >= self._tier.config.max_queued:
            self._tier.count("dropped_queue.put")
            done(Status.REJECTED)
            return
        self._waiting.append(_Put(chunk, stored_bytes(chunk.payload_bytes), done, way))
        self._waiting_keys[chunk.key] += 1

    def take_back(self, meant: Callable[[bytes], bool]) -> int:
        """Do not start the waiting puts that are ``meant``: they are told MISS; their number."""
        taken = [put for put in self._waiting if meant(put.chunk.key)]
        self._waiting = deque(put for put in self._waiting if not meant(put.chunk.key))
        for put in taken:
            self._left(put).done(Status.MISS)
        return len(taken)

    def drop_first(self) -> None:
        """Room that the first waiting put needs could not be made."""
        if self._waiting:
            self._give_up(Status.REJECTED, "dropped_full")

    def start(self) -> None:
        """Start the puts that fit, small chunks several a call; have older chunks deleted for the
        others, which start once that is confirmed, or once slots to encode them are free."""
        batch: list[_Staged] = []
        held: list[_Put] = []
        while self._waiting:
            put = self._waiting[0]
            if not self._tier.available:
                self._give_up(Status.FAILED, "dropped_breaker")
                continue
            if put.way is not None and not self._is_there(put.chunk):
                # Deleted while its other form waited: it is not to come back.
                self._left(self._waiting.popleft()).done(Status.MISS)
                continue
            if self._quota.is_leaving(put.chunk.key):
                self._waiting.popleft()
                held.append(put)
                continue
            if not self._quota.fits(put.nbytes):
                if self._staging.busy:
                    # What is being encoded counts as large as it can become, for now.
                    break
                if put.nbytes <= self._tier.config.size_bytes:
                    self._tier.make_room(sum(waiting.nbytes for waiting in self._waiting))
                    if self._quota.has_leaving:
                        break
                self._give_up(Status.REJECTED, "dropped_full")
                continue
            slot = None
            if self._encoding.encodes if put.way is None else put.way != AS_IS:
                slot = self._staging.borrow(put.chunk)
                if slot is None and self._staging.busy:
                    break
                if slot is None:
                    self._give_up(Status.REJECTED, "dropped_staging")
                    continue
            self._left(self._waiting.popleft())
            self._quota.put_started(put.chunk.key, put.nbytes)
            batch.append(_Staged(put, slot, put.nbytes))
            if sum(s.nbytes for s in batch) >= PUT_BYTES or len(batch) == self._tier.max_batch:
                self._put(batch)
                batch = []
        self._waiting.extendleft(reversed(held))
        if batch:
            self._put(batch)

    def _is_there(self, chunk: HostChunk) -> bool:
        """Whether the store still has what ``chunk`` was read from."""
        key = chunk.key
        return chunk.stamp == self._quota.stamp(key) and not self._quota.is_leaving(key)

    def _give_up(self, status: Status, event: str) -> None:
        self._tier.count(event)
        self._left(self._waiting.popleft()).done(status)

    def _left(self, put: _Put) -> _Put:
        """``put`` waits no longer."""
        self._waiting_keys[put.chunk.key] -= 1
        if not self._waiting_keys[put.chunk.key]:
            del self._waiting_keys[put.chunk.key]
        return put

    def _put(self, batch: list[_Staged]) -> None:
        keys = [staged.put.chunk.key for staged in batch]
        sources: list[Buffer] = []

        def prepare() -> None:
            sources.extend(self._source(staged) for staged in batch)

        def run(ctx: OpContext) -> list[Status]:
            moved = 0
            self._encoding.stores.begin(self._runtime.now_s())
            try:
                statuses = self._tier.connector.put_from(keys, sources, ctx)
                moved = sum(s.nbytes for s, told in zip(batch, statuses) if told is Status.OK)
            finally:
                self._encoding.stores.end(self._runtime.now_s(), moved)
            return statuses

        self._calls.start(
            "put",
            Lane.STORE,
            len(batch),
            run,
            lambda statuses: self._settled(batch, statuses),
            prepare=prepare,
        )

    def _settled(self, batch: list[_Staged], statuses: Sequence[Status]) -> None:
        doubtful = []
        for staged, status in zip(batch, statuses):
            chunk, ok = staged.put.chunk, status is Status.OK
            self._quota.put_ended(chunk.key, chunk.parent, ok=ok, nbytes=staged.nbytes)
            if ok:
                self._tier.stored(chunk.key)
                self._tier.count("stored")
                self._tier.count("stored_bytes", staged.nbytes)
            elif staged.put.way is None:
                doubtful.append(chunk.key)
        # After a rewrite the chunk is there in one of its forms, whole: the contract of puts.
        self._tier.put_ended([staged.put.chunk.key for staged in batch], doubtful)
        for staged, status in zip(batch, statuses):
            staged.put.done(self._returned(staged, status))
        if self._waiting:
            self.start()

    def _source(self, staged: _Staged) -> Buffer:
        """The bytes to store: encoded in the staging slot, or the chunk's own; in a worker."""
        chunk = staged.put.chunk
        if staged.slot is not None:
            slot = self._host.slot(staged.slot)
            nbytes = self._encoding.encode(
                self._host.slot(chunk)[HEADER_BYTES:][: chunk.payload_bytes].toreadonly(),
                slot,
                key=chunk.key,
                layout=chunk.layout,
                way=staged.put.way,
            )
            if nbytes is not None:
                staged.nbytes, staged.encoded = nbytes, True
                return self._host.buffer(staged.slot, slot[:nbytes].toreadonly())
        return self._sealed(chunk)

    def _returned(self, staged: _Staged, status: Status) -> Status:
        """What the owner of the chunk is told.  ABANDONED only where the store may still read
        the chunk's own slot; an encoded one is lost here."""
        if staged.slot is None:
            return status
        if staged.encoded and status is Status.ABANDONED:
            self._staging.forget(staged.slot)
            self._tier.on_lost(staged.slot)
            return Status.FAILED
        self._staging.give_back(staged.slot)
        return status

    def _sealed(self, chunk: HostChunk) -> Buffer:
        """The slot with its envelope's header."""
        slot = self._host.slot(chunk)
        frame(chunk, slot)
        return self._host.buffer(chunk, slot.toreadonly())
