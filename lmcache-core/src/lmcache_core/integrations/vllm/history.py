"""What the latest requests found, for who asks why one of them missed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_core.agent.wire import MissRow
from lmcache_core.cache import Cache
from lmcache_core.integrations.vllm.matches import Match

MAX_REQUESTS = 1024
_LIKE_THE_FIRST = ("never_stored", "identity.", "deadline", "breaker", "no_room", "node_")
"""Reasons that hold for what follows too, where nothing else is known of it."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """``keys`` of a request's prefix, of which those before ``first`` were on the device, and those
    from ``end`` on missed, the first of them for ``reason``."""

    keys: Sequence[bytes]
    first: int
    end: int
    reason: str
    at_s: float


class RequestHistory:
    """Owner thread only."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._asked: OrderedDict[str, _Asked] = OrderedDict()

    def add(self, request_id: str, match: Match, reason: str) -> None:
        """A lookup was decided."""
        keys = [match.key(number) for number in range(match.asked)]
        self._asked[request_id] = _Asked(keys, match.first, match.end, reason, time.time())
        self._asked.move_to_end(request_id)
        if len(self._asked) > MAX_REQUESTS:
            self._asked.popitem(last=False)

    def explain(self, request_id: str) -> list[MissRow] | None:
        """One row a chunk; None for a request that is not known (any more).

        vLLM appends a random part to a request's id: the latest that begins with ``request_id`` is
        meant too.
        """
        asked = self._asked.get(request_id)
        if asked is None:
            begin = request_id + "-"
            names = [name for name in reversed(self._asked) if name.startswith(begin)]
            if not names or not request_id:
                return None
            asked = self._asked[names[0]]
        return [self._row(asked, number) for number in range(len(asked.keys))]

    def _row(self, asked: _Asked, number: int) -> MissRow:
        key = asked.keys[number]
        if number < asked.end:
            return MissRow(number, key, "", "device" if number < asked.first else "loaded")
        gone = self._cache.eviction(key)
        if gone is not None and (number > asked.end or asked.reason == "evicted"):
            at_s = time.time() - (self._cache.now_s() - gone.at_s)
            return MissRow(number, key, "evicted", f"{gone.tier} {gone.policy}", at_s)
        if number == asked.end:
            return MissRow(number, key, asked.reason, "", asked.at_s)
        if asked.reason.startswith(_LIKE_THE_FIRST):
            return MissRow(number, key, asked.reason)
        return MissRow(number, key, "not_needed", f"after chunk {asked.end}")
