"""Authenticated connections between two channels: a listener, and small frames both ways.

A channel puts its control messages on a `Link`; connections of another role (a lane for bytes)
authenticate at the same listener and are handed over as sockets.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from lmcache_core.sdk.channel import PeerRefused
from lmcache_core.sdk.errors import BackendUnavailable, ConfigError
from lmcache_core.sdk.handshake import Introduction, answer, ask
from lmcache_core.sdk.status import Status

MAX_FRAME_BYTES = 1 << 20
MAX_WAITING_BYTES = 4 << 20
"""Of frames that the peer does not take."""
MAX_HANDSHAKES = 16
"""Connections that have not proved anything yet; more are closed at once."""
HANDSHAKE_TIMEOUT_S = 5.0

_FRAME = struct.Struct("<IB")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a channel listens."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str, scheme: str) -> Endpoint:
        """``SCHEME://HOST[:PORT]``; no host is 127.0.0.1, no port any free one.

        Raises:
            ConfigError: another scheme, or a path, user or port that is none.
        """
        hint = f"write {scheme}://HOST:PORT"
        try:
            parts = urlsplit(url)
            port = parts.port or 0
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}", backend=scheme, op="open", hint=hint) from None
        if parts.scheme != scheme or parts.path.strip("/") or parts.username or parts.query:
            raise ConfigError(f"{url!r} is no address", backend=scheme, op="open", hint=hint)
        return cls(scheme, parts.hostname or "127.0.0.1", port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class Link:
    """One authenticated connection that carries frames; thread-safe.

    Attributes:
        peer: name of the other side.
        hello: what it said of itself.
    """

    def __init__(self, peer: str, hello: bytes, sock: socket.socket) -> None:
        self.peer = peer
        self.hello = hello
        self._sock = sock
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._open = True
        sock.setblocking(False)

    def send(self, kind: int, payload: bytes) -> Status:
        """Send a frame of ``kind`` (0 to 255).  Never waits.  REJECTED: larger than
        `MAX_FRAME_BYTES`, or over `MAX_WAITING_BYTES` wait; FAILED: the link has ended."""
        if len(payload) > MAX_FRAME_BYTES:
            return Status.REJECTED
        frame = _FRAME.pack(len(payload), kind) + payload
        with self._lock:
            if not self._open:
                return Status.FAILED
            if len(self._waiting) + len(frame) > MAX_WAITING_BYTES:
                return Status.REJECTED
            if self._waiting:
                self._waiting += frame
                return Status.OK
            try:
                sent = self._sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:
                return Status.FAILED
            if sent < len(frame):
                self._waiting += frame[sent:]
                self._wake()
        return Status.OK

    def close(self) -> None:
        """End it; `run` returns."""
        with self._lock:
            if self._open:
                self._open = False
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                self._wake()

    def run(self, on_frame: Callable[[Link, int, bytes], None]) -> str:
        """Carry frames until the link ends; returns why.  One thread."""
        try:
            return self._run(on_frame)
        except OSError as error:
            return error.strerror or type(error).__name__
        finally:
            with self._lock:
                self._open = False
                for sock in (self._sock, self._wake_in, self._wake_out):
                    sock.close()

    def _run(self, on_frame: Callable[[Link, int, bytes], None]) -> str:
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        incoming = bytearray()
        while True:
            with self._lock:
                if not self._open:
                    return "closed here"
                more = select.POLLOUT if self._waiting else 0
            poller.register(self._sock, select.POLLIN | more)
            ready = dict(poller.poll())
            if self._wake_in.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_in.recv(64)
            events = ready.get(self._sock.fileno(), 0)
            if events & select.POLLOUT:
                self._flush()
            if events & ~select.POLLOUT:
                with contextlib.suppress(BlockingIOError):
                    part = self._sock.recv(1 << 16)
                    if not part:
                        return "the peer ended the connection"
                    incoming += part
                    if not self._parse(incoming, on_frame):
                        return "a frame is larger than allowed"

    def _parse(self, incoming: bytearray, on_frame: Callable[[Link, int, bytes], None]) -> bool:
        while len(incoming) >= _FRAME.size:
            nbytes, kind = _FRAME.unpack_from(incoming)
            if nbytes > MAX_FRAME_BYTES:
                return False
            end = _FRAME.size + nbytes
            if len(incoming) < end:
                break
            payload = bytes(incoming[_FRAME.size : end])
            del incoming[:end]
            on_frame(self, kind, payload)
        return True

    def _flush(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            del self._waiting[: self._sock.send(self._waiting)]

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_out.send(b"\0")


class Listener:
    """Accepts, authenticates, and hands over; each handshake on a thread of its own.

    Args:
        endpoint: a port of 0 takes a free one.
        introduce: what we say of ourselves to one connection; fresh for each.
        accepted: takes the socket, the hello of the peer and what we said; on the handshake's
            thread, which it may keep.
        refused: told why a connection was not accepted.
        full: whether no more connections are wanted, of any role.

    Raises:
        BackendUnavailable: the address can't be listened at.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        secret: bytes,
        introduce: Callable[[], Introduction],
        accepted: Callable[[socket.socket, bytes, Introduction], None],
        refused: Callable[[str], None],
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        self._secret = secret
        self._introduce = introduce
        self._accepted = accepted
        self._full = full
        self._refused = refused
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        try:
            family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
            self._sock = socket.create_server(
                (endpoint.host, endpoint.port), family=family, backlog=64
            )
        except OSError as error:
            raise BackendUnavailable(
                f"{endpoint} can't be listened at: {error.strerror}",
                backend=endpoint.scheme,
                op="open",
                hint="choose another port, or 0 for any free one",
            ) from error
        port = self._sock.getsockname()[1]
        self.endpoint = Endpoint(endpoint.scheme, endpoint.host, port)
        self._thread = threading.Thread(
            target=self._accept, name=f"{endpoint.scheme}-listen", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Accept no more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(1.0)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                if self._sock.fileno() < 0:
                    return
                time.sleep(0.01)  # out of descriptors: others must end first
                continue
            if not self._handshakes.acquire(blocking=False):
                self._refused("busy")
                sock.close()
                continue
            threading.Thread(
                target=self._shake, args=(sock,), name="channel-handshake", daemon=True
            ).start()

    def _shake(self, sock: socket.socket) -> None:
        try:
            tune(sock)
            ours = self._introduce()
            until_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
            hello = answer(sock, self._secret, ours, deadline_s=until_s, full=self._full())
        except (PeerRefused, BackendUnavailable, OSError) as error:
            sock.close()
            self._refused(error.reason if isinstance(error, PeerRefused) else "handshake")
            return
        finally:
            self._handshakes.release()
        self._accepted(sock, hello, ours)


def dial(
    endpoint: Endpoint, secret: bytes, ours: Introduction, *, deadline_s: float
) -> tuple[socket.socket, bytes]:
    """A connection to a `Listener`, and what it says of itself.

    Raises:
        BackendUnavailable: nobody answers there, or not before the deadline.
        PeerRefused: see there.
    """
    left_s = deadline_s - time.monotonic()
    try:
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        sock = socket.create_connection((endpoint.host, endpoint.port), timeout=left_s)
    except OSError as error:
        raise BackendUnavailable(
            f"{endpoint} does not answer: {error.strerror or error}",
            backend=endpoint.scheme,
            op="connect",
            hint="is the engine there running, with this address to listen at?",
        ) from error
    try:
        tune(sock)
        return sock, ask(sock, secret, ours, deadline_s=deadline_s)
    except BaseException:
        sock.close()
        raise


def tune(sock: socket.socket) -> None:
    """No delay for small frames; a host that lost power is noticed within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
