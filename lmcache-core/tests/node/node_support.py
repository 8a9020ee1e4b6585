"""Servers of a test's own, in processes or threads, and clients whose bytes follow from keys."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmcache_core.cache import Attached, Refusal, Slot, Wanted
from lmcache_core.cli.serve import node_status
from lmcache_core.config import EngineConfig, from_mapping
from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.layout import ChunkLayout, LayoutSpec
from lmcache_core.node.address import Address, listen, peer_uid
from lmcache_core.node.client import NodeCache, connect
from lmcache_core.node.protocol import VERSION, Frames, Hello, frame, read_server
from lmcache_core.node.server import NodeServer
from lmcache_core.node.wake import Wake
from lmcache_core.opening import open_chunks
from lmcache_core.transfer.executor import Runtime

PAYLOAD_BYTES = 12_000
SLOT_BYTES = 16_384
LAYOUT = ChunkLayout(chunk_size=16, payload_bytes=PAYLOAD_BYTES, description=b"test")
LIMIT_S = 20.0


def until(ready: Callable[[], object], what: str = "it", limit_s: float = LIMIT_S) -> None:
    """Wait for ``ready``, with a bound."""
    end_s = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < end_s, f"{what} did not happen within {limit_s} s"
        time.sleep(0.005)


def keys_of(name: str, count: int) -> list[bytes]:
    """Stored keys of a prefix."""
    tag = hashlib.sha256(name.encode()).digest()[:8]
    digests = (hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(count))
    return [tag + digest + bytes(6) for digest in digests]


def content(key: bytes, nbytes: int = PAYLOAD_BYTES) -> np.ndarray:
    """The only right payload of ``key``."""
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def server_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A small server's, unless ``settings`` say otherwise."""
    size = {} if "tiers" in settings else {"host_bytes": 64 * SLOT_BYTES}
    return {"prefault": False, **size, **settings}


class Server:
    """``lmc serve`` in a process of its own."""

    def __init__(self, directory: Path, *args: str, **settings: Any) -> None:
        self.directory = directory
        self.socket = str(directory / "node.sock")
        file = directory / "kv.json"
        values = server_settings(settings)
        file.write_text(json.dumps(values))
        command = [sys.executable, "-m", "lmcache_core.cli", "serve", "--json", "--config"]
        self.process = subprocess.Popen(
            [*command, str(file), "--socket", self.socket, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.ready: dict[str, Any] = json.loads(line)

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self) -> dict[str, Any]:
        return node_status(self.socket, "")

    def counter(self, name: str) -> int:
        return int(self.status()["counters"].get(name, 0))

    def rss_bytes(self) -> int:
        """Private memory: without the arena."""
        fields = Path(f"/proc/{self.pid}/status").read_text().split("\n")
        return next(int(line.split()[1]) << 10 for line in fields if line.startswith("RssAnon"))

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        code = self.process.wait(LIMIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@contextlib.contextmanager
def serving(directory: Path, *args: str, **settings: Any) -> Iterator[Server]:
    """A server that is gone at the end, whatever happens."""
    server = Server(directory, *args, **settings)
    try:
        yield server
    finally:
        if server.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)
            server.kill()


def client_config(address: str, **settings: Any) -> EngineConfig:
    values = {"node": address, "lookup_deadline_s": 1.0, "node_retry_s": 0.1, **settings}
    return from_mapping(values)


class Client:
    """An engine with one worker in the same process: a session, and its memory mapped."""

    def __init__(
        self, address: str, *, layouts: Sequence[ChunkLayout] = (LAYOUT,), **settings: Any
    ) -> None:
        self.cache: NodeCache = connect(client_config(address, **settings), layouts)
        self._attached: tuple[object, Attached] | None = None

    def payload(self, slot: Slot, layout: int = 0) -> np.ndarray:
        handle = self.cache.handle
        if self._attached is None or self._attached[0] != handle:
            self.detach()
            self._attached = (handle, handle.attach(warn=print, prefault=False))
        start = slot.offset + HEADER_BYTES
        arena = self._attached[1].arena
        return arena.array[start : start + self.cache.layouts[layout].payload_bytes]

    def reserve(self, keys: Sequence[bytes], layout: int = 0) -> list[Slot | Refusal]:
        parents = [None, *keys]
        return self.cache.reserve([Wanted(k, p, layout) for k, p in zip(keys, parents)])

    def store(self, keys: Sequence[bytes], layout: int = 0) -> int:
        """Store the right content; how many were taken."""
        slots = [s for s in self.reserve(keys, layout) if not isinstance(s, Refusal)]
        for slot in slots:
            payload = self.payload(slot, layout)
            payload[:] = content(slot.key, len(payload))
        self.cache.commit(slots)
        # An answer that comes after it: now the others see it too.
        self.load([])
        return len(slots)

    def load(self, keys: Sequence[bytes], layout: int = 0) -> int:
        """How much of the prefix comes, all of it right."""
        ticket = self.cache.prefetch(keys, layout=layout)
        until(lambda: self.cache.poll() or ticket.done, "an answer")
        hits = ticket.hits()
        for key, slot in zip(keys, hits):
            payload = self.payload(slot, layout)
            assert slot.key == key
            assert np.array_equal(payload, content(key, len(payload))), "wrong bytes"
        self.cache.release(ticket)
        self.cache.poll()
        return len(hits)

    def detach(self) -> None:
        if self._attached is not None:
            self._attached[1].release()
            self._attached = None

    def close(self) -> None:
        self.detach()
        self.cache.close()


@contextlib.contextmanager
def client(address: str, **settings: Any) -> Iterator[Client]:
    made = Client(address, **settings)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def running(
    directory: Path, *, token: str = "", listen_at: str = "", **settings: Any
) -> Iterator[tuple[NodeServer, str]]:
    """A server in a thread of this process, for faults and its insides; with its address."""
    wake = Wake()
    uid_of = settings.pop("uid_of", peer_uid)
    config = from_mapping(server_settings(settings))
    engine = open_chunks(config, runtime=Runtime(wake.set))
    listener = listen(Address.parse(listen_at or str(directory / "node.sock")))
    server = NodeServer(engine, [listener], wake, token=token, uid_of=uid_of)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, str(listener.address)
    finally:
        server.stop()
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the server hangs"
        server.close()
        assert engine.close()
        wake.close()


class Raw:
    """A client that says what it wants, as bytes."""

    def __init__(self, path: str) -> None:
        self.sock = Address.parse(path).connect(LIMIT_S)
        self.frames = Frames()

    def hello(self, role: str = "engine", **fields: Any) -> Any:
        spec = LayoutSpec(LAYOUT.chunk_size, PAYLOAD_BYTES, LAYOUT.description)
        fields = {"version": VERSION, "layouts": (spec,), **fields}
        self.say(frame(Hello(role=role, **fields)))  # type: ignore[arg-type]
        return self.answer()

    def say(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self) -> Any:
        """The next message; None at the end of the stream."""
        while True:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            for body in self.frames.feed(data):
                return read_server(body)

    def close(self) -> None:
        self.sock.close()


def assert_nothing_is_held(status: dict[str, Any], sessions: int) -> None:
    """No slot, no pin, and memory for whole chunks only; as a server's status says."""
    assert len(status["sessions"]) == sessions, status
    for session in status["sessions"]:
        assert (session["slots"], session["tickets"], session["held_bytes"]) == (0, 0, 0)
    assert status["host_used_bytes"] == status["host_chunks"] * SLOT_BYTES
