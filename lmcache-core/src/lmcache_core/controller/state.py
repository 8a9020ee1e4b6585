"""Where hard state lives: documents with versions, in a SQLite file or in Redis.

Opaque bytes by kind and id.  Versions come from one counter of the whole store, so "what changed
since" is one question for all kinds, and a version is never used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcache_core.sdk import ConfigError

MEMORY = ":memory:"
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
GONE_KEPT_S = 3600.0
"""How long `State.changes` tells that a document was deleted."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        value: None in `State.changes`: it was deleted.
        expires_s: Unix time of its end, or None.
    """

    kind: str
    id: str
    value: bytes | None
    version: int
    expires_s: float | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed; ``epoch`` is another one when the store was emptied."""

    epoch: str
    documents: list[Document]


class State(Protocol):
    """Blocking and thread-safe.  Every method raises `BackendUnavailable` when the store can't be
    reached; then a put may or may not have happened.

    Attributes:
        shared: whether other controllers may use it at the same time.
        address: for people, without secrets.
    """

    shared: bool
    address: str

    def get(self, kind: str, id: str) -> Document | None:
        """The document; None when there is none or it expired."""
        ...

    def put(
        self, kind: str, id: str, value: bytes, *, expect: int | None, ttl_s: float | None = None
    ) -> int | None:
        """Write a document in one step.

        Args:
            expect: its version now; 0: there is none; None: whatever is there.
            ttl_s: delete it after so long; None keeps it.

        Returns:
            The new version; None when ``expect`` does not hold, and nothing was written.
        """
        ...

    def put_all(self, kind: str, values: dict[str, bytes]) -> list[int]:
        """Write several documents, whatever is there; each is whole or not written.  Their new
        versions, in order."""
        ...

    def delete(self, kind: str, id: str) -> None:
        """Delete a document; an absent one is fine."""
        ...

    def changes(self, kinds: Sequence[str], *, after: int, limit: int) -> Changes:
        """Documents of ``kinds`` that were written or deleted after version ``after``, oldest
        first.  Those that expired are told or left out."""
        ...

    def count(self, kind: str) -> int:
        """Documents of ``kind``; those that expired a short time ago may be among them."""
        ...

    def close(self) -> None:
        """Close it; later calls raise `BackendUnavailable`."""
        ...


def open_state(address: str) -> State:
    """The store at ``address``: a path, ``:memory:``, or a URL of Redis or Valkey.

    Raises:
        ConfigError: it can't be one, or is another controller's.
        BackendUnavailable: Redis can't be reached at start.
    """
    if address.startswith(REDIS_SCHEMES):
        try:
            from lmcache_core.controller.state_redis import RedisState
        except ImportError as error:
            raise ConfigError(
                f"state in Redis needs {error.name}",
                op="controller",
                hint="pip install 'lmcache-core[controller-redis]'",
            ) from error
        return RedisState(address)
    if "://" in address:
        raise ConfigError(
            f"{address.partition('://')[0]!r} is no kind of state",
            op="controller",
            hint="give a path, or redis://HOST:PORT/DB",
        )
    from lmcache_core.controller.state_sqlite import SqliteState

    return SqliteState(address)
