"""``redis+sentinel://``: the sentinels say who the master is, each time a connection is made.

Client protocol: https://redis.io/docs/latest/develop/reference/sentinel-clients/.  After a failover
the old master's connections break or answer READONLY; the next one goes to the new master.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_backend_redis.scanning import ask
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Reply, ServerError, command
from lmcache_core.sdk import BackendUnavailable

_ONE_SENTINEL_S = 0.5
"""A sentinel that is silent for so long is passed over."""


class SentinelSessions(Sessions):
    """Connections to the master of ``service``; thread-safe.

    Args:
        url: ``redis://[user:password@]anything[/db]``: credentials and database of the master.
        options, limit: see `Sessions`.
        sentinels: to ask, in this order.
        service: the master's name there.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        *,
        limit: int,
        sentinels: Sequence[Sessions],
        service: str,
    ) -> None:
        super().__init__(url, options, limit=limit)
        self._sentinels = list(sentinels)
        self._service = service

    def target(self, deadline_s: float) -> dict[str, Any]:
        said: list[str] = []
        for sentinel in list(self._sentinels):
            left_s = min(_ONE_SENTINEL_S, deadline_s - time.monotonic())
            if left_s <= 0:
                raise TimeoutError("no sentinel answered in time")
            request = command(b"SENTINEL", b"get-master-addr-by-name", self._service.encode())
            try:
                answer = ask(sentinel, request, 1, time.monotonic() + left_s)
            except BackendUnavailable as error:
                said.append(error.message)
                continue
            found = _address(answer)
            if found is not None:
                return {"host": found[0], "port": found[1]}
            said.append(_refusal(answer))
        raise BackendUnavailable(
            f"no sentinel knows a master called {self._service!r}: {'; '.join(said)}",
            backend="redis",
            op="connect",
            hint="redis+sentinel://sentinel:26379[,sentinel:26379]/NAME; is NAME monitored there?",
        )

    def close(self) -> None:
        super().close()
        for sentinel in self._sentinels:
            sentinel.close()


def _address(answer: list[Reply] | None) -> tuple[str, int] | None:
    match answer:
        case [[bytes() as host, bytes() as port]] if port.isdigit():
            return host.decode(errors="replace"), int(port)
    return None


def _refusal(answer: list[Reply] | None) -> str:
    if answer is None:
        return "a sentinel is silent"
    return str(answer[0]) if isinstance(answer[0], ServerError) else "a sentinel does not know it"
