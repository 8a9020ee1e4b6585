"""`Grants`: what a channel has let its peers touch, and who is touching it now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_core.sdk.buffers import Buffer
from lmcache_core.sdk.channel import Access


class Part(NamedTuple):
    """``nbytes`` from ``offset`` on in span number ``span`` of a grant."""

    span: int
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Granted:
    peer: str
    spans: tuple[Buffer, ...]
    access: Access
    until_s: float
    users: int = 0
    revoked: bool = False
    idle: threading.Event = field(default_factory=threading.Event)


class Grants:
    """The side that owns the memory, of a channel that checks every access itself (``guarded``).
    Thread-safe.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[int, _Granted] = {}
        self._last = 0
        self._lock = threading.Lock()

    def add(self, peer: str, spans: Sequence[Buffer], access: Access, lease_s: float) -> int:
        """A new grant's number, which is never used again."""
        with self._lock:
            self._last += 1
            until_s = self._clock() + lease_s
            self._open[self._last] = _Granted(peer, tuple(spans), access, until_s)
            return self._last

    def of(self, peer: str) -> list[int]:
        """Every grant of ``peer`` that is not revoked."""
        with self._lock:
            return [number for number, one in self._open.items() if one.peer == peer]

    def spans(self, number: int) -> tuple[Buffer, ...]:
        """Of a grant that is not revoked; else none."""
        one = self._open.get(number)
        return one.spans if one is not None else ()

    def enter(
        self, number: int, peer: str, access: Access, parts: Sequence[Part]
    ) -> list[Buffer | None]:
        """The span of each part that ``peer`` may touch now, else None.  Ends with `leave`, unless
        every one is None."""
        with self._lock:
            one = self._open.get(number)
            if one is None or one.peer != peer or one.access is not access:
                return [None] * len(parts)
            if one.revoked or self._clock() >= one.until_s:
                return [None] * len(parts)
            spans = [self._span(one, part) for part in parts]
            one.users += any(span is not None for span in spans)
            return spans

    def live(self, number: int) -> bool:
        """Whether what was entered may go on: it is neither revoked nor has its lease ended."""
        one = self._open.get(number)
        return one is not None and not one.revoked and self._clock() < one.until_s

    def leave(self, number: int) -> None:
        """Whoever entered touches it no more."""
        with self._lock:
            one = self._open.get(number)
            if one is not None and one.users:
                one.users -= 1
                if not one.users:
                    one.idle.set()

    def revoke(self, number: int, timeout_s: float) -> bool:
        """Let nobody enter any more; whether everyone has left, within ``timeout_s``.  Then the
        grant is forgotten.  True for one that is unknown."""
        with self._lock:
            one = self._open.get(number)
            if one is None:
                return True
            one.revoked = True
            if not one.users:
                del self._open[number]
                return True
            one.idle.clear()
        one.idle.wait(max(0.0, timeout_s))
        with self._lock:
            if one.users:
                return False
            self._open.pop(number, None)
            return True

    @staticmethod
    def _span(one: _Granted, part: Part) -> Buffer | None:
        if not 0 <= part.span < len(one.spans):
            return None
        span = one.spans[part.span]
        inside = part.offset >= 0 and 0 <= part.nbytes <= span.nbytes - part.offset
        return span if inside else None
