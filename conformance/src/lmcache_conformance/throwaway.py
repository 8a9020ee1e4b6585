"""What throw-away servers of tests, benchmarks and demos share; standard library only."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_with(served: Callable[[], AbstractContextManager[str]], usage: str | None) -> int:
    """Run this process's command line with a server beside it; its exit code.

    Args:
        served: gives the server's URL, which ``{url}`` in the command line stands for.
        usage: told where there is no command line.
    """
    if len(sys.argv) < 2:
        print(usage, file=sys.stderr)
        return 2
    try:
        with served() as url:
            return subprocess.call([word.replace("{url}", url) for word in sys.argv[1:]])
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
