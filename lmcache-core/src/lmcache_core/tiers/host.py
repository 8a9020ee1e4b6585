"""The host tier: chunks in one arena, with pins, an eviction policy and a life cycle.

A chunk is WRITING from `reserve` to `seal`, then SEALED until it is evicted or dropped.
A WRITING chunk is never served.  LOST marks memory that native code may still touch.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lmcache_core.envelope import HEADER_BYTES, stored_bytes
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.allocator import Allocator
from lmcache_core.memory.arena import Arena
from lmcache_core.policy.lru import Lru
from lmcache_core.policy.shares import Shares, Taken
from lmcache_core.sdk import Buffer, ContractViolation, ReleaseToken


class ChunkState(enum.Enum):
    """Life cycle of a slot; FREE slots belong to the allocator and have no chunk."""

    WRITING = "writing"
    SEALED = "sealed"
    LOST = "lost"


class HostChunk:
    """One chunk's slot in the arena: 4 KiB of envelope header, then the payload.

    Attributes:
        key, parent: stored keys of this chunk and of the one before it in the prefix.
        offset: of the slot in the arena; the payload starts `HEADER_BYTES` later.
        layout: of its payload.
        state: see `ChunkState`.
        pins: readers that need it to stay.
        doomed: dropped while pinned; freed with the last pin.
        origin: tier that it came from, "" when the engine computed it.
        codec, read_bytes, stamp: how it was encoded there, its size there, and which put of the
            tier it is of.
        frame_lock, framed: the envelope header is written once, by whoever needs it first.
    """

    __slots__ = (
        "codec",
        "doomed",
        "frame_lock",
        "framed",
        "key",
        "layout",
        "offset",
        "origin",
        "parent",
        "pins",
        "read_bytes",
        "stamp",
        "state",
    )  # fmt: skip

    def __init__(self, key: bytes, parent: bytes | None, offset: int, layout: ChunkLayout) -> None:
        self.key = key
        self.parent = parent
        self.offset = offset
        self.layout = layout
        self.state = ChunkState.WRITING
        self.pins = 0
        self.doomed = False
        self.origin = ""
        self.codec = ""
        self.read_bytes = 0
        self.stamp = 0
        self.frame_lock = threading.Lock()
        self.framed = False

    @property
    def payload_bytes(self) -> int:
        """Length of the payload."""
        return self.layout.payload_bytes


class HostTier:
    """Not thread-safe, but `lend`: the engine's owner thread calls it; payload bytes may be
    copied from other threads while the chunk is WRITING or pinned.

    Args:
        arena: the memory.
        on_evict: told the key of every chunk that is about to leave by eviction, and by which
            policy.

    Attributes:
        on_change: told each key that can be served from now on, and each that no longer can.
    """

    name = "host"

    def __init__(self, arena: Arena, on_evict: Callable[[bytes, str], None] | None = None) -> None:
        self.arena = arena
        self._allocator = Allocator(arena.nbytes)
        self._chunks: dict[bytes, HostChunk] = {}
        self._lru = Lru()
        self._shares = Shares()
        self._on_evict = on_evict or (lambda key, policy: None)
        self._pinning = threading.Lock()
        self.on_change: Callable[[bytes, bool], None] = lambda key, present: None
        self.lost_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, WRITING and LOST ones included."""
        return self._allocator.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """Size of the arena."""
        return self._allocator.capacity_bytes

    def __contains__(self, key: bytes) -> bool:
        """Whether ``key`` has a slot, also one that is still WRITING."""
        return key in self._chunks

    def get(self, key: bytes) -> HostChunk | None:
        """The SEALED chunk of ``key``, or None."""
        chunk = self._chunks.get(key)
        return chunk if chunk is not None and chunk.state is ChunkState.SEALED else None

    def prefix(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are SEALED here."""
        chunks = self._chunks
        sealed = ChunkState.SEALED
        for count, key in enumerate(keys):
            chunk = chunks.get(key)
            if chunk is None or chunk.state is not sealed:
                return count
        return len(keys)

    def reserve(self, key: bytes, parent: bytes | None, layout: ChunkLayout) -> HostChunk | None:
        """A WRITING slot for ``key``, evicting as needed.

        None when ``key`` already has a slot, or when everything else is pinned or written.
        """
        if key in self._chunks:
            return None
        chunk = self.borrow(key, parent, layout)
        if chunk is not None:
            self._chunks[key] = chunk
        return chunk

    def borrow(self, key: bytes, parent: bytes | None, layout: ChunkLayout) -> HostChunk | None:
        """A WRITING slot that is never served: for `abort` or `lose`, not `seal`.

        None when everything else is pinned or written.
        """
        nbytes = stored_bytes(layout.payload_bytes)
        offset = self._allocator.alloc(nbytes)
        if offset is None:
            offset = self._evict_for(nbytes)
            if offset is None:
                return None
        return HostChunk(key, parent, offset, layout)

    def seal(self, chunk: HostChunk) -> None:
        """The payload is whole: the chunk may be served."""
        if chunk.state is not ChunkState.WRITING:
            raise ContractViolation(f"seal of a chunk that is {chunk.state.value}", op="seal")
        if chunk.doomed:
            self._free(chunk)
            return
        chunk.state = ChunkState.SEALED
        self._lru.add(chunk.key, chunk.parent)
        self._shares.count(chunk.key, stored_bytes(chunk.payload_bytes), 1)
        self._shares.add(chunk.key, chunk.parent)
        self.on_change(chunk.key, True)

    def abort(self, chunk: HostChunk) -> None:
        """The payload will not come: free the slot."""
        if chunk.state is not ChunkState.WRITING:
            raise ContractViolation(f"abort of a chunk that is {chunk.state.value}", op="abort")
        self._forget(chunk)
        self._free(chunk)

    def lose(self, chunk: HostChunk) -> None:
        """Native code may still write the slot: keep it mapped and unused."""
        if chunk.state is not ChunkState.WRITING:
            raise ContractViolation(f"lose of a chunk that is {chunk.state.value}", op="lose")
        self._forget(chunk)
        chunk.state = ChunkState.LOST
        self.lost_bytes += stored_bytes(chunk.payload_bytes)

    def found(self, chunk: HostChunk) -> None:
        """A LOST slot can't be touched any more: free it."""
        if chunk.state is not ChunkState.LOST:
            raise ContractViolation(f"release of a chunk that is {chunk.state.value}", op="found")
        self.lost_bytes -= stored_bytes(chunk.payload_bytes)
        self._free(chunk)

    def pin(self, chunk: HostChunk) -> None:
        """Keep a SEALED chunk until `unpin`."""
        if chunk.state is not ChunkState.SEALED:
            raise ContractViolation(f"pin of a chunk that is {chunk.state.value}", op="pin")
        with self._pinning:
            chunk.pins += 1

    def lend(self, key: bytes) -> HostChunk | None:
        """The SEALED chunk of ``key``, pinned; None when it is not here.  From any thread; the
        owner unpins it."""
        with self._pinning:
            chunk = self.get(key)
            if chunk is not None:
                chunk.pins += 1
            return chunk

    def unpin(self, chunk: HostChunk) -> None:
        """End one `pin`."""
        if chunk.pins <= 0:
            raise ContractViolation("unpin without pin", op="unpin")
        with self._pinning:
            chunk.pins -= 1
        if chunk.doomed and not chunk.pins:
            self._free(chunk)

    def touch(self, keys: Sequence[bytes]) -> None:
        """The prefix ``keys`` was used; absent ones are ignored."""
        present = [key for key in keys if key in self._lru]
        self._lru.touch(present)
        self._shares.touch(present)

    def drop(self, keys: Iterable[bytes]) -> int:
        """Forget ``keys`` at once; pinned or WRITING slots are freed when they can be."""
        dropped = 0
        for key in keys:
            chunk = self._chunks.get(key)
            if chunk is None:
                continue
            dropped += 1
            if chunk.state is ChunkState.WRITING:
                self._forget(chunk)
                chunk.doomed = True
                continue
            with self._pinning:
                self._forget(chunk)
                chunk.doomed = True
                pinned = chunk.pins
            if not pinned:
                self._free(chunk)
        return dropped

    def last_use(self, key: bytes) -> int:
        """Of a SEALED chunk: see `Lru.last_use`."""
        return self._lru.last_use(key)

    def keys(self) -> list[bytes]:
        """Every key with a slot."""
        return list(self._chunks)

    def resident(self) -> list[bytes]:
        """Every key that can be served, in no order."""
        return list(self._lru)

    def shares(self, most: int) -> list[Taken]:
        """What the largest namespaces take, at most ``most`` of them."""
        return self._shares.largest(most)

    def limit_shares(self, limits: Mapping[bytes, int]) -> None:
        """Hold each namespace to so many bytes, by tag, and no others, from the next `trim` on."""

        def resident() -> Iterator[tuple[bytes, bytes | None]]:
            return ((key, self._chunks[key].parent) for key in self._lru.resident())

        self._shares.limit(limits, resident)

    def trim(self) -> None:
        """Evict the oldest chunks of namespaces that have more than their share; what is pinned
        stays, and is looked at again."""
        for tag in self._shares.take_over():
            candidates = self._shares.victims(tag, self._evictable)
            while self._shares.surplus(tag) > 0 and (key := next(candidates, None)) is not None:
                self._evict(key, "quota")
            candidates.close()
            if self._shares.surplus(tag) > 0:
                self._shares.again(tag)

    @property
    def over_share(self) -> bool:
        """Whether `trim` may have something to do."""
        return self._shares.over

    def slot(self, chunk: HostChunk) -> memoryview:
        """Header and payload as writable bytes."""
        return self.arena.view(chunk.offset, stored_bytes(chunk.payload_bytes))

    def buffer(self, chunk: HostChunk, view: memoryview) -> Buffer:
        """``view``, which starts at the slot of ``chunk``, as connectors take it."""
        region = self.arena.region
        return Buffer(
            view=view,
            address=region.address + chunk.offset,
            nbytes=len(view),
            memory=region.memory,
            region=region,
            token=ReleaseToken(chunk.offset),
        )

    def payload(self, chunk: HostChunk) -> npt.NDArray[np.uint8]:
        """The payload, flat, uint8, writable: shape ``(payload_bytes,)``."""
        start = chunk.offset + HEADER_BYTES
        return self.arena.array[start : start + chunk.payload_bytes]

    def _evictable(self, key: bytes) -> bool:
        return self._chunks[key].pins == 0

    def _evict_for(self, nbytes: int) -> int | None:
        for key in self._lru.victims(self._evictable):
            if self._evict(key, "lru"):
                offset = self._allocator.alloc(nbytes)
                if offset is not None:
                    return offset
        return None

    def _evict(self, key: bytes, policy: str) -> bool:
        chunk = self._chunks[key]
        with self._pinning:
            if chunk.pins:
                return False  # lent since it was looked at
            self._on_evict(key, policy)
            self._forget(chunk)
        self._free(chunk)
        return True

    def _forget(self, chunk: HostChunk) -> None:
        if self._chunks.get(chunk.key) is chunk:
            del self._chunks[chunk.key]
            if chunk.key in self._lru:
                self._lru.remove(chunk.key)
                self._shares.remove(chunk.key)
                self._shares.count(chunk.key, -stored_bytes(chunk.payload_bytes), -1)
                self.on_change(chunk.key, False)

    def _free(self, chunk: HostChunk) -> None:
        self._allocator.free(chunk.offset)
