"""A Redis server of one's own, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from pd_proxy_rig import until


class RedisServer:
    """Loopback and a unix socket, on the same port each time; keeps nothing."""

    def __init__(self, program: str, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._directory / 's'}"

    def start(self) -> None:
        # fmt: off
        command = [
            self._program, "--bind", "127.0.0.1", "--port", str(self.port), "--save", "",
            "--unixsocket", str(self._directory / "s"), "--unixsocketperm", "600",
            "--dir", str(self._directory),
        ]
        # fmt: on
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._answers, "redis-server did not start")

    def empty(self) -> None:
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=self.port) as client:
            return bool(client.ping())
        return False


@contextlib.contextmanager
def redis_server() -> Iterator[RedisServer]:
    """One that ends with the block; the test is skipped where none is installed."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix="lmc-redis-") as directory:
        server = RedisServer(program, Path(directory))
        try:
            yield server
        finally:
            server.kill()
