"""The nodes of a Redis Cluster: which has which slot, connections to each, and who rests.

Specification: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/.  A node
that does not answer rests: its keys fail at once until a look in the background found it, or its
successor, well.  So no request waits for a failover.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from redis.crc import key_slot

from lmcache_backend_redis.layout import head_name
from lmcache_backend_redis.scanning import ask
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Reply, command
from lmcache_core.sdk import BackendClosed, BackendUnavailable, ConfigError, Workers

Address = tuple[str, int]
SLOTS = 16384
REST_S = 0.5
"""Between two looks at a node that rests."""
LOOK_S = 1.0
"""A look that takes longer has failed."""


class Nodes:
    """Thread-safe.

    Args:
        seeds: nodes to ask for the others.
        open_sessions: makes the connections to one node.
    """

    def __init__(
        self, seeds: Sequence[Address], open_sessions: Callable[[Address], Sessions]
    ) -> None:
        self._seeds = list(seeds)
        self._open_sessions = open_sessions
        self._sessions: dict[Address, Sessions] = {}
        self._owners: list[Address | None] = [None] * SLOTS
        self._resting: dict[Address, float] = {}
        self._looking = False
        self._closed = False
        self._lock = threading.Lock()
        self._workers = Workers("redis-cluster")

    def owner(self, key: bytes) -> Address | None:
        """The node that has ``key``, as far as we know."""
        return self._owners[key_slot(head_name(key))]

    def masters(self) -> list[Address]:
        """Every node that has slots."""
        return sorted({owner for owner in self._owners if owner is not None})

    def sessions(self, address: Address) -> Sessions:
        """The connections to a node."""
        with self._lock:
            if address not in self._sessions:
                self._sessions[address] = self._open_sessions(address)
                if self._closed:
                    self._sessions[address].close()
            return self._sessions[address]

    def moved(self, slot: int, address: Address) -> None:
        """A node said so; the rest of the table is read again in the background."""
        with self._lock:
            self._owners[slot] = address
        self._look()

    def rests(self, address: Address) -> bool:
        """Whether a node did not answer lately; starts a look at it when one is due."""
        due_s = self._resting.get(address)
        if due_s is not None and time.monotonic() >= due_s:
            self._look()
        return due_s is not None

    def rest(self, address: Address) -> None:
        """A node does not answer: leave it alone until a look in the background found it well."""
        with self._lock:
            self._resting[address] = time.monotonic()
        self._look()

    def refresh(self, deadline_s: float) -> None:
        """Learn who has which slot.

        Raises:
            ConfigError: the server is no cluster.
            BackendUnavailable: no node can say.
        """
        reasons: list[str] = []
        known = [a for a in dict.fromkeys([*self.masters(), *self._seeds])]
        for address in sorted(known, key=lambda each: each in self._resting):
            limit_s = min(deadline_s, time.monotonic() + LOOK_S)
            try:
                replies = ask(self.sessions(address), command(b"CLUSTER", b"SLOTS"), 1, limit_s)
            except BackendUnavailable as error:
                reasons.append(error.message)
                continue
            if replies is None:
                reasons.append(f"{address[0]}:{address[1]} is silent")
                continue
            owners = _owners(replies[0], address)
            if owners is not None:
                with self._lock:
                    self._owners = owners
                return
            reasons.append(f"{address[0]}:{address[1]}: {replies[0]!s:.100}")
            if "cluster support disabled" in reasons[-1]:
                raise ConfigError(
                    reasons[-1], backend="redis", op="open", hint="write redis:// for one server"
                )
        raise BackendUnavailable(
            f"no node of the cluster answers: {'; '.join(reasons)}",
            backend="redis",
            op="connect",
            hint="are they running, and can the addresses that they announce be reached?",
        )

    def close(self) -> None:
        """Close every connection."""
        with self._lock:
            self._closed = True
            every = list(self._sessions.values())
        for sessions in every:
            sessions.close()
        self._workers.close()

    def _look(self) -> None:
        """Start a look, unless one runs."""
        with self._lock:
            if self._looking or self._closed:
                return
            self._looking = True
        try:
            self._workers.start(self._look_around)
        except BackendUnavailable:
            self._looking = False

    def _look_around(self) -> None:
        """On a worker: read the table, then ask those that rest whether they are well."""
        try:
            with contextlib.suppress(BackendUnavailable, BackendClosed, ConfigError):
                self.refresh(time.monotonic() + 3 * LOOK_S)
            masters = set(self.masters())
            for address in list(self._resting):
                well = address not in masters or self._is_well(address)
                with self._lock:
                    if well:
                        self._resting.pop(address, None)
                    else:
                        self._resting[address] = time.monotonic() + REST_S
        finally:
            self._looking = False

    def _is_well(self, address: Address) -> bool:
        try:
            found = ask(self.sessions(address), command(b"PING"), 1, time.monotonic() + LOOK_S)
        except (BackendUnavailable, BackendClosed, ConfigError):
            return False
        return found == [b"PONG"]


def _owners(reply: Reply, asked: Address) -> list[Address | None] | None:
    """CLUSTER SLOTS as one owner a slot; None when it is no such reply."""
    if not isinstance(reply, list):
        return None
    owners: list[Address | None] = [None] * SLOTS
    for row in reply:
        match row:
            case [int() as first, int() as last, [host, int() as port, *_], *_]:
                # An empty host means the one that was asked.
                name = host.decode() if isinstance(host, bytes) and host else asked[0]
                if 0 <= first <= last < SLOTS:
                    owners[first : last + 1] = [(name, port)] * (last + 1 - first)
            case _:
                return None
    return owners
