"""Where a node server listens, and who may come in."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lmcache_core.sdk import ConfigError

_MAX_PATH_BYTES = 107
"""Of a unix socket: sockaddr_un has no room for more."""
_BACKLOG = 128
_PEER = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Address:
    """A unix socket's ``path``, or ``host`` and ``port`` of TCP."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """``/path``, ``unix:///path`` or ``tcp://host:port``.

        Raises:
            ConfigError: none of these.
        """
        hint = "write /run/lmcache/node.sock or tcp://127.0.0.1:9250"
        if text.startswith("/") or text.startswith("unix:///"):
            path = text.removeprefix("unix://")
            if len(os.fsencode(path)) > _MAX_PATH_BYTES:
                raise ConfigError(
                    f"{path} is too long for a socket", op="node", hint="give a shorter path"
                )
            return cls(path=path)
        try:
            parts = urlsplit(text)
            if parts.scheme == "tcp" and parts.hostname and not parts.path:
                return cls(host=parts.hostname, port=parts.port or 0)
        except ValueError:
            pass
        raise ConfigError(f"{text!r} is no address of a node server", op="node", hint=hint)

    @property
    def is_tcp(self) -> bool:
        """Whether it is TCP, which asks for a token."""
        return not self.path

    def __str__(self) -> str:
        return self.path or f"tcp://{self.host}:{self.port}"

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket with this time-out.

        Raises:
            OSError: nobody listens there, or not in time.
        """
        if self.is_tcp:
            found = socket.create_connection((self.host, self.port), timeout_s)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return found
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(timeout_s)
            made.connect(self.path)
        except BaseException:
            made.close()
            raise
        return made


def default_path() -> str:
    """``$XDG_RUNTIME_DIR/lmcache/node.sock``, or one in /tmp that is this user's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = f"{runtime}/lmcache" if runtime else f"/tmp/lmcache-{os.getuid()}"
    return f"{directory}/node.sock"


@dataclass(slots=True)
class Listener:
    """A listening socket; for unix with the lock that says that its owner lives."""

    address: Address
    socket: socket.socket
    _lock: int = -1

    def close(self) -> None:
        """Stop listening, and take the socket's file away."""
        self.socket.close()
        if self._lock >= 0:
            # While the lock is ours: the next owner's file must not go.
            Path(self.address.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def listen(address: Address) -> Listener:
    """Listen at ``address``; over a unix socket only for this user.

    Raises:
        ConfigError: another server lives there, or the place can't be used.
    """
    try:
        if address.is_tcp:
            made = socket.create_server((address.host, address.port), backlog=_BACKLOG)
            made.setblocking(False)
            return Listener(Address(host=address.host, port=made.getsockname()[1]), made)
        return _listen_unix(address)
    except OSError as error:
        raise ConfigError(
            f"can't listen at {address}: {error.strerror or error}",
            op="serve",
            hint="choose another address, or stop what listens there",
        ) from error


def _listen_unix(address: Address) -> Listener:
    path = Path(address.path)
    _private_directory(path.parent)
    # The lock, not the socket's file, says whether its owner lives: two that start at the same
    # time would both find a stale file.
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        try:
            address.connect(1.0).close()
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise _taken(path)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Before bind, so that the file never exists with another mode.
            os.fchmod(made.fileno(), 0o600)
            made.bind(address.path)
            made.listen(_BACKLOG)
            made.setblocking(False)
        except BaseException:
            made.close()
            raise
    except BaseException:
        os.close(lock)
        raise
    return Listener(address, made, lock)


def _taken(path: Path) -> ConfigError:
    return ConfigError(
        f"a node server runs at {path} already",
        op="serve",
        hint=f"use it (lmc node --socket {path}), stop it, or give --socket",
    )


def _private_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
        raise ConfigError(
            f"{directory} can be written by others", op="serve", hint=f"chmod 700 {directory}"
        )


def peer_uid(connection: socket.socket) -> int:
    """Who holds the other end of a unix socket."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(packed)[1])


def is_trusted(connection: socket.socket, uid_of: Callable[[socket.socket], int]) -> bool:
    """Whether a unix socket's other end is this user, or root."""
    return uid_of(connection) in (os.getuid(), 0)
