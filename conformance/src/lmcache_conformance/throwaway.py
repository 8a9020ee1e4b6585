"""What throw-away servers of tests, benchmarks and demos share; standard library only."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

_SLEEPER = """
import select, sys, time
print(flush=True)
held_up_s, last_s = 0.0, time.monotonic()
while not select.select([sys.stdin], [], [], 0.005)[0]:
    now_s = time.monotonic()
    held_up_s += max(0.0, now_s - last_s - 0.01)
    last_s = now_s
print(held_up_s + max(0.0, time.monotonic() - last_s - 0.01))
"""


class Stopwatch:
    """Seconds of a block, less those in which the machine let nobody run.

    A process beside this one sleeps in short steps: what it oversleeps is no fault of ours.

    Attributes:
        seconds: once the block has ended.
    """

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._sleeper = subprocess.Popen(
            [sys.executable, "-IS", "-c", _SLEEPER],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._sleeper.stdout is not None
        self._sleeper.stdout.readline()
        self._started_s = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.monotonic() - self._started_s
        held_up_s, _ = self._sleeper.communicate()
        self.seconds -= float(held_up_s)


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
