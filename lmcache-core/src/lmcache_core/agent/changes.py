"""What an engine's tiers hold, as changes that each controller follows at its own pace."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_core.agent import wire
from lmcache_core.chunks import ChunkEngine
from lmcache_core.keys import STORED_KEY_BYTES

MAX_KEPT = 262_144
"""Changes that are kept for controllers which are behind; who is further behind gets all anew."""
KEYS_A_PIECE = 16_384
"""Of everything that is held, in one sync."""
MAX_TAKEN = 16_384


@dataclass(slots=True)
class Cursor:
    """How far one controller has been told.

    Attributes:
        at: number of the next change for it; below 0 nothing was told yet.
        pieces: what is left of all that is held, when that is being told.
        wanted: all is to be told: `Changes.tick` fills ``pieces``.
    """

    at: int = -1
    pieces: deque[wire.Change] = field(default_factory=deque)
    wanted: bool = True


class Changes:
    """Written by the engine's owner, read by the links' threads; thread-safe.

    Attributes:
        asked: somebody wants to be told all that is held: `tick` is due.
    """

    def __init__(self, engine: ChunkEngine) -> None:
        self._engine = engine
        self.tiers = ["host", *(tier.name for tier in engine.tiers.readable)][: wire.MAX_TIERS]
        self._number = {name: number for number, name in enumerate(self.tiers)}
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, bool, bytes]] = deque()
        self._first = 0
        self._cursors: list[Cursor] = []
        self.asked = True
        engine.on_residency(self._changed)

    def cursor(self) -> Cursor:
        """For one controller."""
        cursor = Cursor()
        with self._lock:
            self._cursors.append(cursor)
        return cursor

    def tick(self) -> None:
        """Say all that is held to those who want it.  Owner only."""
        self.asked = False
        wanting = [cursor for cursor in self._cursors if cursor.wanted]
        held = [self._engine.host.resident()]
        held += [tier.resident() for tier in self._engine.tiers.readable]
        pieces = [
            wire.Change(number, True, b"".join(keys[at : at + KEYS_A_PIECE]))
            for number, keys in enumerate(held[: wire.MAX_TIERS])
            for at in range(0, len(keys), KEYS_A_PIECE)
        ]
        with self._lock:
            for cursor in wanting:
                cursor.pieces = deque(pieces)
                cursor.at = self._first + len(self._kept)
                cursor.wanted = False

    def again(self, cursor: Cursor) -> None:
        """Its controller has a gap, or is another one: it is to be told all."""
        with self._lock:
            cursor.wanted = self.asked = True
            cursor.pieces.clear()

    def behind(self, cursor: Cursor) -> bool:
        """Whether there is something to tell."""
        with self._lock:
            return bool(cursor.pieces) or cursor.at < self._first + len(self._kept)

    def take(self, cursor: Cursor) -> tuple[wire.Change, ...]:
        """The next changes; none when all is to be told first."""
        with self._lock:
            if cursor.wanted:
                return ()
            if cursor.pieces:
                return (cursor.pieces.popleft(),)
            if cursor.at < self._first:
                cursor.wanted = self.asked = True
                return ()
            start = cursor.at - self._first
            kept = self._kept
            count = min(len(kept) - start, MAX_TAKEN)
            several = [kept[at] for at in range(start, start + count)]
            changes = _grouped(several)
            cursor.at += sum(len(change.keys) for change in changes) // STORED_KEY_BYTES
            return changes

    def _changed(self, tier: str, key: bytes, present: bool) -> None:
        number = self._number.get(tier)
        if number is None:
            return
        with self._lock:
            self._kept.append((number, present, key))
            if len(self._kept) > MAX_KEPT:
                self._kept.popleft()
                self._first += 1


def _grouped(several: Sequence[tuple[int, bool, bytes]]) -> tuple[wire.Change, ...]:
    """As few changes as the order allows; at most `wire.MAX_CHANGES`, the rest is left out."""
    found: list[wire.Change] = []
    at = 0
    while at < len(several) and len(found) < wire.MAX_CHANGES:
        tier, present, _ = several[at]
        end = at
        while end < len(several) and several[end][:2] == (tier, present):
            end += 1
        found.append(wire.Change(tier, present, b"".join(key for _, _, key in several[at:end])))
        at = end
    return tuple(found)
