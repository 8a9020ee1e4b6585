"""Why a chunk that no tier has is not there: evicted, stored under another identity, or new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lmcache_core.keys import Namespace

MAX_EVICTED = 65_536
MAX_PREFIXES = 16_384
MAX_NAMESPACES = 4


class MissLog:
    """What this engine has seen lately, in bounded memory.  Owner thread only."""

    def __init__(self) -> None:
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._seen: OrderedDict[int, list[Namespace]] = OrderedDict()

    def evicted(self, key: bytes) -> None:
        """``key`` left the host tier."""
        self._evicted[key] = None
        if len(self._evicted) > MAX_EVICTED:
            self._evicted.popitem(last=False)

    def saw(self, first_chunk: Sequence[int], namespace: Namespace) -> None:
        """A request with these first tokens came under ``namespace``."""
        known = self._seen.setdefault(hash(tuple(first_chunk)), [])
        self._seen.move_to_end(hash(tuple(first_chunk)))
        if namespace not in known:
            known.append(namespace)
            del known[:-MAX_NAMESPACES]
        if len(self._seen) > MAX_PREFIXES:
            self._seen.popitem(last=False)

    def explain(self, key: bytes, first_chunk: Sequence[int], namespace: Namespace) -> str:
        """``evicted``, ``identity.FIELD`` or ``never_stored``.

        The field is one in which the same first tokens were asked for before; only what this
        process saw is known.
        """
        if key in self._evicted:
            return "evicted"
        for other in self._seen.get(hash(tuple(first_chunk)), ()):
            fields = namespace.differing_fields(other)
            if fields:
                return f"identity.{fields[0]}"
        return "never_stored"
