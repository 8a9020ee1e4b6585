"""A connection to a controller: HTTP/1.1 of the standard library, with a token and bounds."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lmcache_core.sdk import BackendUnavailable, ConfigError

MAX_ANSWER_BYTES = 64 << 20
_HINT = "write http://127.0.0.1:9300 or https://HOST:PORT"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class ControllerLink:
    """One kept connection; not thread-safe.

    Args:
        url: ``http://HOST:PORT`` or ``https://``.
        token: shown with every request.
        ca_file: PEM certificates to trust instead of the system's.

    Raises:
        ConfigError: the URL or the file is wrong.
    """

    def __init__(self, url: str, *, token: str, ca_file: str = "") -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigError(f"{url!r} is no address of a controller", hint=_HINT)
        if parts.username or parts.path.strip("/"):
            raise ConfigError("a controller's address has no user and no path", hint=_HINT)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._host, self._port = parts.hostname, port
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": "lmcache-core"}
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"{ca_file} has no certificates: {error}") from error
        self._open: http.client.HTTPConnection | None = None
        self._aborted = False

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request.  A kept connection that the other side had closed is opened anew, once, when
        nothing can have been done yet.

        Args:
            timeout_s: for each step: connecting, sending, each piece of the answer.

        Raises:
            BackendUnavailable: no answer, or one that is no HTTP or too large.
        """
        sent = dict(self._headers, **(headers or {}))
        if body is not None:
            sent["Content-Type"] = content_type
        for last in (True,) if self._open is None else (False, True):
            try:
                return self._once(method, path, body, sent, timeout_s)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                failed = self._failed(error)
                if last or self._aborted:
                    raise failed from error
            except (OSError, http.client.HTTPException) as error:
                raise self._failed(error) from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """Break off a request that is in flight in another thread, which is told that it failed;
        there will be no other."""
        self._aborted = True
        connection = self._open
        sock = connection.sock if connection is not None else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was first

    def _once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> Answer:
        connection = self._connection(timeout_s)
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read(MAX_ANSWER_BYTES + 1)
        if len(content) > MAX_ANSWER_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if answer.will_close:
            self.close()
        given = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, given.get("content-type", ""), content, given)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        found = self._open
        if found is None:
            if self._tls is not None:
                found = http.client.HTTPSConnection(
                    self._host, self._port, timeout=timeout_s, context=self._tls
                )
            else:
                found = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
            found.connect()
            found.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open = found
        elif found.sock is not None:
            found.sock.settimeout(timeout_s)
        return found

    def _failed(self, error: Exception) -> BackendUnavailable:
        self.close()
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return BackendUnavailable(
            f"the controller at {self.url} can't be reached: {why}",
            op="controller",
            hint="is `lmc controller` running there?",
        )
