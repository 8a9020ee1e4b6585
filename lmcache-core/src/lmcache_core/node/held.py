"""What a `lmcache_core.node.client.NodeCache` has given out, and through which link."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from lmcache_core.cache import Slot, Wanted
from lmcache_core.node import protocol
from lmcache_core.node.link import Link


class NodeHit(msgspec.Struct, frozen=True, gc=False):
    """`lmcache_core.cache.Slot` of a chunk that is read; its ticket keeps it."""

    key: bytes
    offset: int


class NodeSlot:
    """`lmcache_core.cache.Slot` of a chunk that is written.

    Attributes:
        held: what it is taken from.
        doomed: what is written is not to be served.
    """

    __slots__ = ("doomed", "held", "key", "offset")

    def __init__(self, key: bytes, offset: int, held: Held) -> None:
        self.key = key
        self.offset = offset
        self.held = held
        self.doomed = False


class NodeTicket:
    """`lmcache_core.cache.Ticket`; decided by the server, or by its deadline.

    Attributes:
        held: what it is taken from; None without a server.
        reason: why the chunk after its hits did not come.
    """

    __slots__ = (
        "_deadline_s", "_hits", "_packed", "_tier_of", "_tiers", "decided", "held", "keys",
        "number", "reason", "released",
    )  # fmt: skip

    def __init__(
        self, keys: Sequence[bytes], number: int, held: Held | None, deadline_s: float
    ) -> None:
        self.keys = keys
        self.number = number
        self.held = held
        self.decided = self.released = False
        self.reason = ""
        self._deadline_s = deadline_s
        self._packed: array[int] = array("Q")
        self._tier_of = b""
        self._tiers: tuple[str, ...] = ()
        self._hits: list[NodeHit] | None = None

    @property
    def done(self) -> bool:
        """Whether `hits` is final.  Never blocks; True once the deadline has passed."""
        if not self.decided and time.monotonic() >= self._deadline_s:
            self.end("deadline")
        return self.decided

    @property
    def sources(self) -> dict[bytes, str]:
        """Key -> name of the tier that it was fetched from for this ticket."""
        fetched = zip(self.keys, self._tier_of)
        return {key: self._tiers[tier - 1] for key, tier in fetched if tier}

    def hits(self, start: int = 0) -> Sequence[NodeHit]:
        """The chunks from ``start`` on that are in host without a gap, pinned."""
        if self._hits is None:
            if not self.decided or self.held is None or self.released:
                return []
            self._hits = list(map(NodeHit, self.keys, self._packed))
        return self._hits[start:] if start else self._hits

    def end(self, reason: str) -> None:
        """Final without a hit."""
        self.decided = True
        self.reason = reason

    def settle(self, answer: protocol.Decided, tiers: tuple[str, ...]) -> None:
        """Final as the server says, unless it was final before."""
        if self.decided:
            return
        self._packed = protocol.unpack_offsets(answer.offsets)
        self._tier_of = answer.sources
        self._tiers = tiers
        self.end(answer.reason)

    def forget(self) -> None:
        """Released: its chunks may go."""
        self.released = self.decided = True
        self._hits = None


class Held:
    """A link, and what is held through it.

    Attributes:
        unanswered: reservations whose answer has not come.
        unseen: numbers of tickets of which the server has said nothing, and when each was sent;
            it answers in this order, also those that were released meanwhile.
    """

    __slots__ = ("link", "slots", "tickets", "unanswered", "unseen")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.slots: dict[int, NodeSlot] = {}
        self.tickets: dict[int, NodeTicket] = {}
        self.unanswered = 0
        self.unseen: dict[int, float] = {}

    @property
    def in_use(self) -> bool:
        """Whether somebody may read or write its memory."""
        return bool(self.slots or self.tickets)

    @property
    def idle(self) -> bool:
        """Whether it is not in use, and nothing is to be said or heard."""
        if self.in_use:
            return False
        return self.link.broken or not (self.unanswered or self.link.unsent)

    def is_silent(self, now_s: float, reply_s: float) -> bool:
        """Whether an answer is overdue, of what has been read so far."""
        return bool(self.unseen) and now_s - next(iter(self.unseen.values())) > reply_s


def by_holder(slots: Iterable[Slot]) -> Iterable[tuple[Held, list[NodeSlot]]]:
    """``slots`` by the link that they are taken from; a slot that has ended counts once."""
    found: dict[int, tuple[Held, list[NodeSlot]]] = {}
    for slot in slots:
        assert isinstance(slot, NodeSlot)
        held = slot.held
        if held.slots.get(slot.offset) is slot:
            del held.slots[slot.offset]
            found.setdefault(id(held), (held, []))[1].append(slot)
    return found.values()


def runs_of(wanted: Iterable[Wanted]) -> tuple[protocol.Run, ...]:
    """``wanted`` as they travel: most are chunks of one prefix after another."""
    runs: list[protocol.Run] = []
    keys: list[bytes] = []
    first: Wanted | None = None
    for one in wanted:
        if first is None or one.parent != keys[-1] or one[2:] != first[2:]:
            if first is not None:
                runs.append(protocol.Run(b"".join(keys), *first[1:]))
            first, keys = one, []
        keys.append(one.key)
    if first is not None:
        runs.append(protocol.Run(b"".join(keys), *first[1:]))
    return tuple(runs)
