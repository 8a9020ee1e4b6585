"""A request's prefix on its way to the host tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmcache_core.tiers.host import HostChunk


class Prefetch:
    """A prefix on its way to the host tier.

    ``done`` turns True when the prefix is decided: everything arrived, a chunk missed, or
    the deadline passed.  Until the engine's ``release`` its chunks stay pinned.

    Attributes:
        keys: of the prefix, in order; ``chunks`` has the pinned chunk of each, or None.
        parent: key of the chunk before the first, if any.
        pending: indices whose fetch has not settled.
        asking: the tiers have not yet said what they hold.
        stop: chunks from this index on will not come.
        sources: key -> name of the tier that it was fetched from for this ticket.
        closed: released.
    """

    __slots__ = (
        "_now_s",
        "asking",
        "chunks",
        "closed",
        "deadline_s",
        "keys",
        "parent",
        "pending",
        "sources",
        "stop",
    )

    def __init__(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        *,
        deadline_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._now_s = now_s
        self.keys = list(keys)
        self.parent = parent
        self.deadline_s = deadline_s
        self.chunks: list[HostChunk | None] = [None] * len(keys)
        self.pending: set[int] = set()
        self.asking = False
        self.stop = len(keys)
        self.sources: dict[bytes, str] = {}
        self.closed = False

    @property
    def done(self) -> bool:
        """Whether `hits` is final.  Never blocks."""
        if not (self.asking or self.pending):
            return True
        return self._now_s() >= self.deadline_s

    def hits(self) -> list[HostChunk]:
        """The contiguous prefix that is in host now, pinned."""
        found: list[HostChunk] = []
        for chunk in self.chunks[: self.stop]:
            if chunk is None:
                break
            found.append(chunk)
        return found
