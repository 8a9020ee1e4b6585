"""What an engine adapter needs of a cache: `Cache`, whichever process holds it.

`EmbeddedCache` is the cache in this process; `lmcache_core.node.client.NodeCache` is the one
that a node server shares.  Both give slots of an arena, which workers map by an `ArenaHandle`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.memory.arena import Arena, ArenaRef
from lmcache_core.metrics import Metrics
from lmcache_core.misses import Eviction
from lmcache_core.prefetch import Prefetch
from lmcache_core.tiers.host import HostChunk

OnResidency = Callable[[str, bytes, bool], None]


class Slot(Protocol):
    """A chunk's place in the arena: 4 KiB of header at ``offset``, then the payload."""

    @property
    def key(self) -> bytes:
        """The stored key."""
        ...

    @property
    def offset(self) -> int:
        """Of the slot in the arena, in bytes."""
        ...


class Ticket(Protocol):
    """A prefix on its way to the host tier; see `lmcache_core.prefetch.Prefetch`."""

    @property
    def keys(self) -> Sequence[bytes]:
        """Of the prefix, in order."""
        ...

    @property
    def sources(self) -> dict[bytes, str]:
        """Key -> name of the tier that it was fetched from for this ticket."""
        ...

    @property
    def done(self) -> bool:
        """Whether `hits` is final.  Never blocks; True once the deadline has passed."""
        ...

    def hits(self, start: int = 0) -> Sequence[Slot]:
        """The chunks from ``start`` on that are in host without a gap, pinned."""
        ...


class Wanted(NamedTuple):
    """A slot that is asked for.

    Attributes:
        layout: index of one of the cache's layouts.
        blank: zero the payload, since not all of it will be written.
    """

    key: bytes
    parent: bytes | None
    layout: int = 0
    blank: bool = False


class Refusal(enum.Enum):
    """Why `Cache.reserve` gives no slot."""

    PRESENT = "present"
    """The chunk is there, or somebody is writing it."""
    ARRIVING = "arriving"
    """It is on its way from a lower tier, which may yet fail: ask again in a later step."""
    NO_ROOM = "no_room"
    """Everything is pinned or being written; or the cache can't be reached.  Counted."""


class Attached(NamedTuple):
    """An arena in this process, and what ends its use."""

    arena: Arena
    release: Callable[[], None]


class ArenaHandle(Protocol):
    """What a worker needs to map the arena; pickled when it is another process.  Equal handles
    name the same memory."""

    def attach(self, *, warn: Callable[[str], None], prefault: bool) -> Attached:
        """Map it.

        Raises:
            ArenaError: it can't be mapped here, or is gone.
        """
        ...


class Cache(Protocol):
    """One owner thread; no call waits for I/O, but `close`, and `reserve` for one round trip.

    Attributes:
        config: of the engine.
        metrics: of this process.
        layouts: what its chunks may look like, by index.
        capacity_bytes: of the host tier.
        owner: held by whoever acts as the owner, where more than one thread does.
    """

    config: EngineConfig
    metrics: Metrics
    layouts: tuple[ChunkLayout, ...]
    capacity_bytes: int
    owner: AbstractContextManager[object]

    @property
    def handle(self) -> ArenaHandle:
        """The arena that slots given from now on lie in; another one only when no slot and no
        ticket is open."""
        ...

    @property
    def settling(self) -> bool:
        """Whether stored chunks still need this process to poll."""
        ...

    def now_s(self) -> float:
        """The clock of deadlines, in seconds."""
        ...

    def poll(self) -> None:
        """Bring in what has come, send what is to be sent."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when something has come, at the latest after ``timeout_s``."""
        ...

    def prefetch(
        self,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        layout: int = 0,
        deadline_s: float | None = None,
    ) -> Ticket:
        """Start moving ``keys`` to host, a prefix or the rest of one after ``parent``.

        Without a ``deadline_s``, on the clock of `now_s`, it is ``lookup_deadline_s`` from now.
        """
        ...

    def why_missed(self, ticket: Ticket, index: int) -> str:
        """Why chunk ``index`` of ``ticket`` did not come; "" when nobody knows it."""
        ...

    def eviction(self, key: bytes) -> Eviction | None:
        """How ``key`` left a tier last; None when it did not, or nobody here knows it."""
        ...

    def release(self, ticket: Ticket) -> None:
        """End the ticket: unpin its chunks, want no more of them.  Idempotent."""
        ...

    def reserve(self, wanted: Sequence[Wanted]) -> list[Slot | Refusal]:
        """Slots to write, which end in `commit` or `abort`; one round trip for all."""
        ...

    def commit(self, slots: Sequence[Slot]) -> None:
        """The payloads are written: serve them, unless they were dropped meanwhile."""
        ...

    def abort(self, slots: Sequence[Slot]) -> None:
        """The payloads will not be written."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """The prefix ``keys`` was used."""
        ...

    def forget(self, keys: Sequence[bytes]) -> None:
        """Drop ``keys`` from the host tier; slots being written are freed at their end."""
        ...

    def reset(self) -> None:
        """This engine's weights changed: nothing that it stored or stores is served to it, and
        slots being written are freed at their end."""
        ...

    def on_residency(self, changed: OnResidency) -> None:
        """Have ``changed`` told tier, key, and whether it is there now, in the owner's thread."""
        ...

    def close(self) -> bool:
        """Flush within ``close_timeout_s`` and end; False when something still runs."""
        ...


@dataclass(frozen=True)
class LocalArena:
    """`ArenaHandle` of an arena whose owner is this process, or one that can be looked into."""

    ref: ArenaRef
    live: Arena | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[type[LocalArena], tuple[ArenaRef]]:
        return LocalArena, (self.ref,)

    def attach(self, *, warn: Callable[[str], None], prefault: bool) -> Attached:
        """See `ArenaHandle.attach`."""
        if self.live is not None:
            return Attached(self.live, lambda: None)
        arena = Arena.attach(self.ref, warn=warn, prefault=prefault)
        return Attached(arena, lambda: _close(arena))


class EmbeddedCache:
    """A `ChunkEngine` of this process as a `Cache`, whose namespaces have one owner."""

    def __init__(self, engine: ChunkEngine, layouts: Sequence[ChunkLayout]) -> None:
        self.engine = engine
        self.config = engine.config
        self.metrics = engine.metrics
        self.layouts = tuple(layouts)
        self.capacity_bytes = engine.host.capacity_bytes
        self.owner: AbstractContextManager[object] = engine.owner
        self._handle = LocalArena(engine.host.arena.ref, engine.host.arena)

    @property
    def handle(self) -> LocalArena:
        return self._handle

    @property
    def settling(self) -> bool:
        return self.engine.settling

    def now_s(self) -> float:
        return self.engine.now_s()

    def poll(self) -> None:
        self.engine.poll()

    def wait(self, timeout_s: float) -> None:
        self.engine.runtime.wait(timeout_s)

    def prefetch(
        self,
        keys: Sequence[bytes],
        *,
        parent: bytes | None = None,
        layout: int = 0,
        deadline_s: float | None = None,
    ) -> Prefetch:
        return self.engine.prefetch_keys(
            keys, layout=self.layouts[layout], parent=parent, deadline_s=deadline_s
        )

    def why_missed(self, ticket: Ticket, index: int) -> str:
        assert isinstance(ticket, Prefetch)
        return self.engine.why_missed(ticket, index)

    def eviction(self, key: bytes) -> Eviction | None:
        return self.engine.evicted.get(key)

    def release(self, ticket: Ticket) -> None:
        assert isinstance(ticket, Prefetch)
        self.engine.release(ticket)

    def reserve(self, wanted: Sequence[Wanted]) -> list[Slot | Refusal]:
        return [self._reserve(*one) for one in wanted]

    def commit(self, slots: Sequence[Slot]) -> None:
        self.engine.commit(_ours(slots))

    def abort(self, slots: Sequence[Slot]) -> None:
        self.engine.abort(_ours(slots))

    def touch(self, keys: Sequence[bytes]) -> None:
        self.engine.host.touch(keys)

    def forget(self, keys: Sequence[bytes]) -> None:
        self.engine.host.drop(keys)

    def reset(self) -> None:
        self.engine.host.drop(self.engine.host.keys())

    def close(self) -> bool:
        return self.engine.close()

    def on_residency(self, changed: OnResidency) -> None:
        """Have ``changed`` told tier, key, and whether it is there now, in the owner's thread."""
        self.engine.on_residency(changed)

    def _reserve(
        self, key: bytes, parent: bytes | None, layout: int, blank: bool
    ) -> HostChunk | Refusal:
        return reserve_in(self.engine, key, parent, self.layouts[layout], blank=blank)


def reserve_in(
    engine: ChunkEngine, key: bytes, parent: bytes | None, layout: ChunkLayout, *, blank: bool
) -> HostChunk | Refusal:
    """One slot of ``engine``, or why there is none."""
    if engine.is_arriving(key):
        return Refusal.ARRIVING
    if key in engine.host:
        return Refusal.PRESENT
    chunk = engine.reserve_key(key, parent, layout=layout)
    if chunk is None:
        return Refusal.NO_ROOM
    if blank:
        # What the slot held before must not reach a lower tier under this key.
        engine.host.payload(chunk)[:] = 0
    return chunk


def _ours(slots: Sequence[Slot]) -> list[HostChunk]:
    return [slot for slot in slots if isinstance(slot, HostChunk)]


def _close(arena: Arena) -> None:
    arena.close()
