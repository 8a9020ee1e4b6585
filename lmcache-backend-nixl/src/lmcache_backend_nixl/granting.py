"""What a ``nixl+ucx://`` channel has granted, and which peers have said that they are done with it.

The contract's `Grants` counts who touches a span here; a one-sided transfer is seen by its
initiator only, so that one is asked, and believed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lmcache_backend_nixl.transfers import Peer
from lmcache_core.sdk import Buffer, ReleaseToken


@dataclass(slots=True, eq=False)
class Granted:
    """One grant that has not been returned.

    Attributes:
        until_s: end of the lease, on our clock.
        asked: REVOKE was sent.
        abandoned: the caller of revoke went without it; its tokens are released later.
        returned: nobody can touch the spans any more.
    """

    number: int
    peer: Peer
    spans: tuple[Buffer, ...]
    until_s: float
    asked: bool = False
    abandoned: bool = False
    returned: bool = False


class Granting:
    """Thread-safe.

    Args:
        released: `ChannelHost.released`.
    """

    def __init__(self, released: Callable[[ReleaseToken], None]) -> None:
        self._released = released
        self._open: dict[int, Granted] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()

    def add(self, peer: Peer, spans: tuple[Buffer, ...], until_s: float) -> Granted:
        """A new one; its number is never used again."""
        with self._changed:
            one = Granted(next(self._numbers), peer, spans, until_s)
            self._open[one.number] = one
            return one

    def find(self, number: int) -> Granted | None:
        """One that has not been returned."""
        with self._changed:
            return self._open.get(number)

    def of(self, peer: Peer) -> list[Granted]:
        """Those of a peer that have not been returned."""
        with self._changed:
            return [one for one in self._open.values() if one.peer is peer]

    def gone_peers(self) -> list[Peer]:
        """Those that have a grant, and no link any more."""
        with self._changed:
            return list({one.peer: None for one in self._open.values() if one.peer.ended})

    def returned(self, number: int, peer: Peer) -> None:
        """``peer`` has said so; another's word is worth nothing."""
        one = self.find(number)
        if one is not None and one.peer is peer:
            self._return([one])

    def all_returned(self, peer: Peer) -> None:
        """``peer`` has said that it is done with everything, or is dead."""
        self._return(self.of(peer))

    def wait(self, one: Granted, timeout_s: float) -> bool:
        """Whether it has been returned, within so long."""
        with self._changed:
            return self._changed.wait_for(lambda: one.returned, timeout_s)

    def abandon(self, one: Granted) -> bool:
        """Go without it; False when it has just been returned."""
        with self._changed:
            if one.returned:
                return False
            one.abandoned = True
            return True

    def _return(self, several: list[Granted]) -> None:
        tokens: list[ReleaseToken] = []
        with self._changed:
            for one in several:
                if one.returned:
                    continue
                one.returned = True
                self._open.pop(one.number, None)
                if one.abandoned:
                    tokens += [span.token for span in one.spans]
            self._changed.notify_all()
        for token in tokens:
            self._released(token)
