"""Connections: redis-py connects and logs in, then the socket is ours.

redis-py owns URL, TCP, TLS, AUTH and SELECT; every byte after that goes through `Session`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
import redis.connection

from lmcache_backend_redis.wire import PlainWire, Session, TlsWire
from lmcache_core.sdk import BackendClosed, BackendUnavailable, ConfigError

T = TypeVar("T")

_REFUSED = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.DataError,
)


_parse_url: Callable[[str], dict[str, Any]] = redis.connection.parse_url


class Sessions:
    """At most ``limit`` open connections to one server; thread-safe.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads it.
        options: further arguments of redis-py's connection class.
        limit: connections at the same time.
    """

    def __init__(self, url: str, options: Mapping[str, Any], *, limit: int) -> None:
        try:
            parsed = dict(_parse_url(url))
        except ValueError as error:
            raise ConfigError(
                f"the URL can't be read: {error}",
                backend="redis",
                op="open",
                hint="redis://[user:password@]host[:port][/db]",
            ) from error
        database = urlsplit(url).path.strip("/")
        if not url.startswith("unix:") and not (database.isdigit() or not database):
            # redis-py would take database 0.
            raise ConfigError(
                f"{database!r} is no number of a database",
                backend="redis",
                op="open",
                hint="redis://[user:password@]host[:port][/db]",
            )
        self._class: Any = parsed.pop("connection_class", redis.Connection)
        self._options = {**parsed, **options, "protocol": 2}
        self._limit = threading.BoundedSemaphore(limit)
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(self, op: Callable[[Session], T], deadline_s: float) -> T:
        """``op`` on a connection of its own; done again when the connection had died idle.

        ``op`` must be safe to repeat, and leave no reply unread when it returns.

        Raises:
            BackendUnavailable: the server can't be reached or hung up.
            TimeoutError: the deadline (monotonic s) has passed.
            BackendClosed: after `close`.
        """
        if not self._limit.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TimeoutError("every connection is in use")
        try:
            session = self._take()
            if session is not None:
                try:
                    return self._use(session, op)
                except TimeoutError:
                    raise
                except OSError:
                    # The server was restarted: what else is idle has died with it.
                    self.drop_idle()
            try:
                return self._use(self.connect(deadline_s), op)
            except TimeoutError:
                raise
            except OSError as error:
                raise _unavailable(error) from error
        finally:
            self._limit.release()

    def connect(self, deadline_s: float) -> Session:
        """A new connection, logged in.

        Raises:
            ConfigError: the server refuses these credentials.
            BackendUnavailable: it can't be reached.
            TimeoutError: the deadline has passed.
        """
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        made = self._class(
            **{**self._options, **self.target(deadline_s)},
            socket_timeout=left_s,
            socket_connect_timeout=left_s,
            driver_info=None,
        )
        try:
            made.connect()
        except _REFUSED as error:
            raise ConfigError(
                f"the server refuses the login: {error}",
                backend="redis",
                op="connect",
                hint="check user, password and ACL of the URL",
            ) from error
        except redis.exceptions.TimeoutError as error:
            raise TimeoutError("the server does not answer") from error
        except (redis.exceptions.RedisError, OSError) as error:
            raise _unavailable(error) from error
        sock = made._sock
        tls = isinstance(made, redis.SSLConnection)
        # redis-py would close the socket with its own object.
        made._sock = None
        return Session(TlsWire(sock) if tls else PlainWire(sock))

    def target(self, deadline_s: float) -> dict[str, Any]:
        """Where to connect to, when it is not where the URL says; arguments of redis-py.

        Raises:
            BackendUnavailable, TimeoutError: nobody knows.
        """
        return {}

    def close(self) -> None:
        """Close idle connections; one in use is closed when its call ends."""
        with self._lock:
            self._closed = True
        self.drop_idle()

    def _take(self) -> Session | None:
        with self._lock:
            if self._closed:
                raise BackendClosed("the connector was closed", backend="redis", op="connect")
            return self._idle.pop() if self._idle else None

    def _use(self, session: Session, op: Callable[[Session], T]) -> T:
        try:
            result = op(session)
        except BaseException:
            # The stream may be out of step.
            session.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return result
        session.close()
        return result

    def drop_idle(self) -> None:
        """Close connections that nobody uses now; the next call makes a new one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()


def _unavailable(error: Exception) -> BackendUnavailable:
    return BackendUnavailable(
        str(error) or type(error).__name__,
        backend="redis",
        op="connect",
        hint="is the server running, and does it listen there?",
    )
