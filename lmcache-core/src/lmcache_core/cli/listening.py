"""What every command that serves does to its process: listen, take many clients, keep its files."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

from lmcache_core.sdk import ConfigError

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send small pieces at once.

    Raises:
        ConfigError: the address can't be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        # asyncio does so only where the socket's protocol number is given, which it is not here:
        # each piece would wait for the acknowledgement of the one before, up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            f"can't listen at {host}:{port}: {error.strerror or error}",
            op="listen",
            hint="choose another --host or --port (0 takes a free one)",
        ) from error


def address_of(listener: socket.socket, host: str, *, scheme: str = "http") -> str:
    """The URL under which ``listener``, made for ``host``, is reached."""
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}:{listener.getsockname()[1]}"


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    found: str = listener.getsockname()[0]
    return found.startswith(("127.", "::1"))


def allow_files() -> None:
    """As many open files as this process may have: each client takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def state_file(name: str) -> Path:
    """A file in this user's state directory, which need not be there."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "lmcache-core" / name
