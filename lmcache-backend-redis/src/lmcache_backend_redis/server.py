"""A throw-away server for tests, benchmarks and the demo: loopback or a unix socket only.

    python -m lmcache_backend_redis.server COMMAND {url} ...

runs COMMAND with ``{url}`` replaced, and stops the server after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from lmcache_conformance.throwaway import free_port, run_with

START_LIMIT_S = 10.0


class RedisServer:
    """``redis-server`` (or ``valkey-server``) in a directory of its own.

    Args:
        directory: for its files; a temporary one when None.
        arguments: further ones, such as ``("--maxmemory", "64mb")``.

    Attributes:
        program, directory, socket_path, port: of the server; constant over restarts.

    Raises:
        RuntimeError: no server program, or it does not start; the message says the fix.
    """

    def __init__(self, directory: Path | None = None, arguments: tuple[str, ...] = ()) -> None:
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            raise RuntimeError("redis-server is not installed; try: apt-get install redis-server")
        self.program = found
        self._owned = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="lmc-redis-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket_path = self.directory / "s"
        self.port = free_port()
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Over TCP."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Over the unix socket."""
        return f"unix://{self.socket_path}"

    @property
    def runs(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the same port and directory each time; returns when it answers."""
        log = (self.directory / "log").open("ab")
        # fmt: off
        command = [
            self.program, "--bind", "127.0.0.1", "--port", str(self.port),
            "--unixsocket", str(self.socket_path), "--unixsocketperm", "600",
            "--dir", str(self.directory), "--save", "", "--daemonize", "no", *self._arguments,
        ]
        # fmt: on
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end_s:
                tail = (self.directory / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"the server did not start:\n{tail}")
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process is not None:
            self.resume()
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None and self._process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove what it left in a temporary directory."""
        self.kill()
        if self._owned:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(1)
                sock.connect(str(self.socket_path))
                sock.sendall(b"PING\r\n")
                return sock.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@contextlib.contextmanager
def _served() -> Iterator[str]:
    with RedisServer() as server:
        yield server.unix_url


def main() -> int:
    """Run the command line with a server; its exit code."""
    return run_with(_served, __doc__)


if __name__ == "__main__":
    sys.exit(main())
