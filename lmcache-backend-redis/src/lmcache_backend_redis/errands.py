"""What one call asks of one key of a cluster, until a node has decided it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from lmcache_backend_redis.wire import ServerError
from lmcache_backend_redis.writing import ELSEWHERE, as_exception
from lmcache_core.sdk import BackendUnavailable, Status, status_of_oserror


class Errand:
    """One key of a batch of exists, put or delete, until a node has decided it."""

    __slots__ = ("elsewhere", "key", "source", "status")

    def __init__(self, key: bytes, source: memoryview | None = None) -> None:
        self.key = key
        self.source = source
        self.status: Status | None = None
        self.elsewhere: ServerError | None = None

    @property
    def open(self) -> bool:
        """Whether no node has decided it."""
        return self.status is None and self.elsewhere is None

    @property
    def failed(self) -> bool:
        """Whether it is FAILED."""
        return self.status is Status.FAILED

    def settle(self, status: Status) -> None:
        """Decide it."""
        self.status = status

    def take(self, error: ServerError | None, done: Status) -> None:
        """Decide it by what the server said; ``done`` when that was no error."""
        if error is None:
            self.status = done
        elif error.code in ELSEWHERE:
            self.elsewhere = error
        else:
            raised = as_exception(error)
            if isinstance(raised, BackendUnavailable):
                raise raised
            assert isinstance(raised, OSError)
            self.status = status_of_oserror(raised)


class Routed(Protocol):
    """What `Errand` and `Read` have in common."""

    key: bytes
    elsewhere: ServerError | None

    @property
    def open(self) -> bool: ...

    @property
    def failed(self) -> bool: ...

    def settle(self, status: Status) -> None: ...


R = TypeVar("R", bound=Routed)


def fail(errands: Sequence[Routed] | Iterator[Routed]) -> None:
    """Give up what is open."""
    for errand in errands:
        errand.elsewhere = None
        if errand.open:
            errand.settle(Status.FAILED)
