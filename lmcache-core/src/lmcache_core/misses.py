"""Why a chunk that no tier has is not there: evicted, stored under another identity, or new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from lmcache_core.keys import Namespace

MAX_EVICTED = 65_536
MAX_PREFIXES = 16_384
MAX_NAMESPACES = 4


class Eviction(NamedTuple):
    """When a chunk went (on the engine's clock), from which tier, and why: ``lru``, ``quota`` or
    ``cleared``."""

    at_s: float
    tier: str
    policy: str


class EvictedKeys:
    """The latest chunks that left a tier, at most `MAX_EVICTED`."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, Eviction] = OrderedDict()

    def add(self, key: bytes, eviction: Eviction) -> None:
        """``key`` left."""
        self._keys[key] = eviction
        self._keys.move_to_end(key)
        if len(self._keys) > MAX_EVICTED:
            self._keys.popitem(last=False)

    def get(self, key: bytes) -> Eviction | None:
        """How ``key`` left last; None when that is not known (any more)."""
        return self._keys.get(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys


class MissLog:
    """Under which identities prefixes were asked for lately, in bounded memory.  Owner thread
    only."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, list[Namespace]] = OrderedDict()

    def saw(self, first_chunk: Sequence[int], namespace: Namespace) -> None:
        """A request with these first tokens came under ``namespace``."""
        known = self._seen.setdefault(hash(tuple(first_chunk)), [])
        self._seen.move_to_end(hash(tuple(first_chunk)))
        if namespace not in known:
            known.append(namespace)
            del known[:-MAX_NAMESPACES]
        if len(self._seen) > MAX_PREFIXES:
            self._seen.popitem(last=False)

    def explain(self, first_chunk: Sequence[int], namespace: Namespace) -> str:
        """``identity.FIELD`` or ``never_stored``, of a chunk that nobody knows.

        The field is one in which the same first tokens were asked for before; only what this
        process saw is known.
        """
        for other in self._seen.get(hash(tuple(first_chunk)), ()):
            fields = namespace.differing_fields(other)
            if fields:
                return f"identity.{fields[0]}"
        return "never_stored"
