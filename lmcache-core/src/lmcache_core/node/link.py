"""One connection to a node server, as its client sees it."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence

from lmcache_core.layout import ChunkLayout, LayoutSpec
from lmcache_core.node import protocol
from lmcache_core.node.address import Address
from lmcache_core.node.protocol import (
    Frames,
    FromClient,
    FromServer,
    Hello,
    ProtocolError,
    Refused,
    Role,
    Welcome,
)
from lmcache_core.sdk import BackendUnavailable, ConfigError
from lmcache_core.tokens import read_token

MAX_UNSENT_BYTES = 16 << 20
"""What waits for a server that does not read; more, and the link is broken."""
_READ_BYTES = 256 << 10


class Link:
    """A greeted connection.  Owner thread only; never blocks but in `wait`.

    Attributes:
        welcome: what the server is.
        fd: file of the arena when it came along, else -1; whoever takes it sets it to -1.
        broken: nothing more comes, or can be sent.
    """

    def __init__(self, sock: socket.socket, welcome: Welcome, fd: int, frames: Frames) -> None:
        self.welcome = welcome
        self.fd = fd
        self.broken = False
        self._sock = sock
        self._frames = frames
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(sock)
        sock.setblocking(False)

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._unsent) and not self.broken

    def say(self, message: FromClient) -> None:
        """Queue ``message`` until `flush`."""
        if not self.broken:
            self._unsent += protocol.frame(message)
            if len(self._unsent) > MAX_UNSENT_BYTES:
                self.broken = True

    def flush(self) -> None:
        """Send what the server takes now."""
        try:
            while self._unsent and not self.broken:
                del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.broken = True

    def read(self) -> Sequence[FromServer]:
        """What has come."""
        found: list[FromServer] = []
        while not self.broken:
            try:
                data = self._sock.recv(_READ_BYTES)
                if not data:
                    self.broken = True
                    break
                found += [protocol.read_server(body) for body in self._frames.feed(data)]
            except (BlockingIOError, InterruptedError):
                break
            except (OSError, ProtocolError):
                self.broken = True
            else:
                if len(data) < _READ_BYTES:
                    break
        return found

    def wait(self, timeout_s: float) -> None:
        """Send what waits; return when something has come, or more can be sent, at the latest
        after ``timeout_s``."""
        self.flush()
        if self.broken:
            return
        self._poll.modify(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        self._poll.poll(max(0.0, timeout_s) * 1e3)

    def close(self) -> None:
        """End it: the server frees what this session held once its workers have ended too."""
        self.broken = True
        self._sock.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def greet(
    address: Address,
    *,
    role: Role,
    session: str = "",
    layouts: Sequence[ChunkLayout] = (),
    token_file: str = "",
    timeout_s: float,
) -> Link:
    """Connect and greet.

    Raises:
        BackendUnavailable: no server answers within ``timeout_s``, or it is full or stopping.
        ConfigError: it refuses: other version, wrong token, chunks that do not fit.
    """
    token = read_token(token_file) if address.is_tcp and token_file else ""
    if address.is_tcp and not token:
        raise ConfigError(
            f"{address} asks for a token", op="node", hint="set node_token_file to the server's"
        )
    hello = Hello(
        protocol.VERSION,
        role,
        session,
        token,
        os.getpid(),
        tuple(LayoutSpec.of(layout) for layout in layouts),
    )
    fds: list[int] = []
    sock: socket.socket | None = None
    try:
        sock = address.connect(timeout_s)
        sock.sendall(protocol.frame(hello))
        frames = Frames()
        answer = _answer(sock, frames, fds, address)
        if isinstance(answer, Welcome):
            return Link(sock, answer, fds.pop() if fds else -1, frames)
    except OSError as error:
        _close(sock, fds)
        raise BackendUnavailable(
            f"no node server answers at {address}: {error.strerror or error}",
            op="node",
            hint=f"start one: lmc serve {'--listen' if address.is_tcp else '--socket'} {address}",
        ) from error
    except BaseException:
        _close(sock, fds)
        raise
    _close(sock, fds)
    if not isinstance(answer, Refused):
        raise ProtocolError(f"{address} is no node server", op="node", hint="check the address")
    kind = BackendUnavailable if answer.reason in ("full", "closing", "session") else ConfigError
    raise kind(f"{address}: {answer.message}", op="node", hint=answer.hint)


def _answer(sock: socket.socket, frames: Frames, fds: list[int], address: Address) -> FromServer:
    """The first frame, with the files that come with it.  Raises OSError at the stream's end."""
    while True:
        if address.is_tcp:
            data = sock.recv(_READ_BYTES)
        else:
            data, found, _, _ = socket.recv_fds(sock, _READ_BYTES, 1)
            fds += found
        if not data:
            raise ConnectionError("it closed the connection")
        for body in frames.feed(data):
            return protocol.read_server(body)


def _close(sock: socket.socket | None, fds: list[int]) -> None:
    if sock is not None:
        sock.close()
    while fds:
        os.close(fds.pop())
