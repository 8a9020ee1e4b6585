"""Which engine gets a request.  Pure: the clock is given, nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from lmcache_core.proxy.config import Engine

_REQUEST_WEIGHT = 4096
"""What a request costs beside its prompt, as bytes of a prompt."""
_MAX_LATE = 3


class Outcome(Enum):
    """How a request to an engine ended.

    DONE: it answered.  FAILED: it could not be reached, broke off, or answered 5xx.  LATE: its
    answer was no longer needed when it had not come; one is no fault, several in a row are.
    CANCELLED: says nothing about it.
    """

    DONE = "done"
    FAILED = "failed"
    LATE = "late"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Lease:
    """One request at one engine, from `Pool.pick` to `Pool.end`."""

    engine: Engine
    weight: int
    serial: int
    trial: bool


@dataclass(frozen=True, slots=True)
class State:
    """What `Pool.states` tells of an engine: whether it takes requests, and what it has."""

    engine: Engine
    healthy: bool
    in_flight: int


@dataclass(slots=True)
class _Slot:
    engine: Engine
    load: int = 0
    in_flight: int = 0
    down: bool = False
    retry_at_s: float = 0.0
    trying: bool = False
    late: int = 0
    last_serial: int = 0


class Pool:
    """Engines of one kind.  Not thread-safe: it belongs to one event loop.

    An engine that failed is left alone for ``retry_s``; then one request tries it, and the others
    follow when that was answered.
    """

    def __init__(
        self, engines: Sequence[Engine], *, retry_s: float, now_s: Callable[[], float]
    ) -> None:
        self._slots = {engine: _Slot(engine) for engine in engines}
        self._retry_s = retry_s
        self._now_s = now_s
        self._serial = 0
        self._open: set[int] = set()

    def pick(
        self, prompt_bytes: int, *, without: Collection[Engine] = (), at_any_cost: bool = False
    ) -> Lease | None:
        """The engine with the least bytes of prompts in flight, longest unused among equals.

        Args:
            without: engines that are not wanted.
            at_any_cost: take one that failed rather than none.

        Returns:
            What `end` must be given exactly once; None when there is no such engine.
        """
        wanted = [slot for slot in self._slots.values() if slot.engine not in without]
        usable = [slot for slot in wanted if self._takes(slot)]
        if not usable and at_any_cost:
            usable = wanted
        if not usable:
            return None
        slot = min(usable, key=lambda slot: (slot.load, slot.last_serial))
        self._serial += 1
        lease = Lease(slot.engine, prompt_bytes + _REQUEST_WEIGHT, self._serial, slot.down)
        self._open.add(lease.serial)
        slot.last_serial = lease.serial
        slot.load += lease.weight
        slot.in_flight += 1
        slot.trying |= lease.trial
        return lease

    def answered(self, lease: Lease) -> None:
        """The engine has begun to answer: it is well, however long the rest takes."""
        slot = self._slots[lease.engine]
        slot.down, slot.late = False, 0

    def end(self, lease: Lease, outcome: Outcome) -> None:
        """Take ``lease`` back, and learn from how it ended.

        Raises:
            ValueError: it was given back before.
        """
        if lease.serial not in self._open:
            raise ValueError(f"request {lease.serial} has ended before")
        self._open.remove(lease.serial)
        slot = self._slots[lease.engine]
        slot.load -= lease.weight
        slot.in_flight -= 1
        if lease.trial:
            slot.trying = False
        self._learn(slot, lease, outcome)

    def states(self) -> list[State]:
        """Every engine, in the order given."""
        return [
            State(slot.engine, self._takes(slot), slot.in_flight) for slot in self._slots.values()
        ]

    def _takes(self, slot: _Slot) -> bool:
        return not slot.down or (not slot.trying and self._now_s() >= slot.retry_at_s)

    def _learn(self, slot: _Slot, lease: Lease, outcome: Outcome) -> None:
        if outcome is Outcome.DONE:
            self.answered(lease)
        elif outcome is Outcome.LATE:
            slot.late += 1
            if lease.trial or slot.late >= _MAX_LATE:
                self._fail(slot)
        elif outcome is Outcome.FAILED:
            self._fail(slot)

    def _fail(self, slot: _Slot) -> None:
        slot.down, slot.late = True, 0
        slot.retry_at_s = self._now_s() + self._retry_s
