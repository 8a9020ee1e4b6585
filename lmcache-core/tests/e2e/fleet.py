"""Processes of a small fleet: controllers, a node server, and two vLLM engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lmcache_core.demo import pd_pair

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 180.0
CHUNK_TOKENS = 128
CHUNK_BYTES = CHUNK_TOKENS * 30 * 2 * 3 * 64 * 4
"""Of SmolLM2-135M: layers, keys and values, heads, dimensions, fp32."""
HOST_CHUNKS = 24


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def until(ready: Callable[[], Any], what: str, limit_s: float = 30.0) -> Any:
    """What ``ready`` gives once that is true."""
    end_s = time.monotonic() + limit_s
    while True:
        found = ready()
        if found:
            return found
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {limit_s} s: {what}")
        time.sleep(0.05)


class Process:
    """A command of ``lmc`` that serves until it is ended; it says in JSON when it is ready."""

    def __init__(self, log: Path, *words: str) -> None:
        self.words = words
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmcache_core.cli", *words, "--json"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("{"):
            raise AssertionError(f"{words[0]} did not start: {log.read_text()[-2000:]}")
        self.facts: dict[str, Any] = json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._end()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)
        self._end()

    def _end(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


class Fleet:
    """Everything in one directory; `close` ends it."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.token_file = directory / "token"
        self.ports = [free_port(), free_port()]
        self.controllers: dict[int, Process] = {}
        self.node: Process | None = None
        self.engines: dict[str, pd_pair.Engine] = {}
        self._asked = 0
        for name in ("a-disk", "n-disk"):
            (directory / name).mkdir()
        subprocess.run(self._lmc("token", str(self.token_file)), check=True, capture_output=True)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def _lmc(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "lmcache_core.cli", *words]

    # Controllers.

    def start_controller(self, number: int, state: str) -> Process:
        """Controller ``number``, 0 or 1, on ``state``."""
        words = ("controller", "--port", str(self.ports[number]), "--state", state)
        limits = ("--token-file", str(self.token_file), "--lease-s", "3", "--job-timeout-s", "120")
        log = self.directory / f"controller-{number}.log"
        self.controllers[number] = process = Process(log, *words, *limits)
        return process

    def lmc(self, *words: str, codes: tuple[int, ...] = (0,)) -> Any:
        """What a command of ``lmc`` says as JSON; every live controller is named to it."""
        urls = [
            word
            for number in sorted(self.controllers)
            for word in ("--controller", self.urls[number])
        ]
        command = self._lmc(*words, "--json", *urls, "--token-file", str(self.token_file))
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if done.returncode not in codes:
            said = f"{done.stdout[-1500:]} {done.stderr[-1500:]}"
            raise AssertionError(f"lmc {' '.join(words)}: exit {done.returncode}: {said}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    # Caches.

    def _settings(self, name: str, disk: str, **more: Any) -> dict[str, Any]:
        return {
            "tiers": [
                {"host": HOST_CHUNKS * (CHUNK_BYTES + 8192)},
                {"url": f"file://{self.directory / disk}", "name": "disk"},
            ],
            "chunk_size": CHUNK_TOKENS,
            "instance": name,
            "controllers": self.urls,
            "controller_token_file": str(self.token_file),
            "controller_sync_s": 0.1,
            "channel": "tcp://127.0.0.1:0",
            "channel_token_file": str(self.token_file),
            "ask_directory": True,
            "prefault": False,
            **more,
        }

    def start_node(self) -> Process:
        """The node server ``n``."""
        config = self.directory / "node.json"
        config.write_text(json.dumps(self._settings("n", "n-disk")))
        socket_path = str(self.directory / "node.sock")
        words = ("serve", "--config", str(config), "--socket", socket_path)
        self.node = Process(self.directory / "node.log", *words)
        return self.node

    def start_engine(self, name: str) -> None:
        """Engine ``a``, which has its cache, or ``b``, whose cache the node server has."""
        if name == "a":
            extra = self._settings("a", "a-disk")
        else:
            extra = {
                "node": str(self.directory / "node.sock"),
                "instance": name,
                "chunk_size": CHUNK_TOKENS,
                "controllers": self.urls,
                "controller_token_file": str(self.token_file),
                "controller_sync_s": 0.1,
            }
        self.engines[name] = pd_pair.Engine(
            self.directory / f"engine-{name}.log",
            str(self.model),
            connector="LMCacheCoreConnector",
            role="kv_both",
            extra=extra,
            program=[str(HERE / "engine.py")],
        )

    def ask(
        self, engine: str, text: str, *, first: int, salt: str = "", name: str = ""
    ) -> dict[str, Any]:
        """The answer of an engine to the first tokens of ``text``, with what it prefilled."""
        self._asked += 1
        name = name or f"request-{self._asked}"
        order = {"text": text, "first": first, "tokens": 4, "salt": salt}
        self.engines[engine].ask(name, **order)
        return self.engines[engine].answer(name)

    def kill_engine(self, name: str) -> None:
        engine = self.engines.pop(name)
        os.kill(engine.pid, signal.SIGKILL)
        engine.close()

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        for process in (self.node, *self.controllers.values()):
            if process is not None:
                process.close()


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """A Redis of our own; its URL."""
    path = directory / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", ""]
    process = subprocess.Popen(
        [*command, "--appendonly", "no", "--dir", str(directory)], stdout=subprocess.DEVNULL
    )
    try:
        until(path.exists, "a Redis socket")
        yield f"unix://{path}"
    finally:
        process.terminate()
        process.wait(10)
