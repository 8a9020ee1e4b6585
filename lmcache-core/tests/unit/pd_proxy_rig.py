"""Engines that do as they are told, and a proxy before them, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from lmcache_core.cli.listening import listen
from lmcache_core.proxy.app import build
from lmcache_core.proxy.config import Engine, ProxyConfig
from lmcache_core.proxy.exchange import Exchange

LIMIT_S = 10.0
JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream")]


def until(done: Callable[[], Any], what: str = "") -> None:
    """Wait for ``done``, which another thread makes true."""
    end_s = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end_s, what or "it did not come"
        time.sleep(0.002)


@dataclass
class Seen:
    """A request as an engine got it; ``aborted`` when its client left before the end."""

    path: str
    headers: dict[str, str]
    raw: bytes
    aborted: bool = False

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def transfer(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["kv_transfer_params"]["lmcache"]
        return found


@dataclass
class FakeEngine:
    """Answers ``pieces`` with ``status``; the first waits for ``go``, the others for ``more``.

    ``dies_after``: pieces after which the connection is lost.
    """

    name: str
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: list(JSON))
    pieces: list[bytes] = field(default_factory=list)
    dies_after: int | None = None
    go: threading.Event = field(default_factory=threading.Event)
    more: threading.Event = field(default_factory=threading.Event)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.pieces = self.pieces or [json.dumps({"from": self.name}).encode()]
        self.go.set()
        self.more.set()

    @property
    def channel(self) -> str:
        return f"tcp://{self.name}:7001"

    @property
    def aborted(self) -> int:
        return sum(seen.aborted for seen in self.seen)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        seen = Seen(scope["path"], headers, raw)
        self.seen.append(seen)
        answer = asyncio.create_task(self._answer(send))
        left = asyncio.create_task(receive())
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        seen.aborted = not answer.done()
        answer.cancel()
        left.cancel()

    async def _answer(self, send: Any) -> None:
        await _set(self.go)
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for number, piece in enumerate(self.pieces):
            if number == self.dies_after:
                return  # uvicorn drops the connection of an answer without an end
            if number:
                await _set(self.more)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.dies_after is None:
            await send({"type": "http.response.body", "body": b""})


async def _set(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0.002)


class _Server(uvicorn.Server):
    """Ends at once, not at some tenth of a second; what it does then is cancelled."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: Any = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.lifespan.shutdown()


@contextlib.contextmanager
def served(app: Any, *, lifespan: Any = "off") -> Iterator[str]:
    """The URL at which ``app`` is served."""
    listener = listen("127.0.0.1", 0)
    server = _Server(uvicorn.Config(app, log_config=None, lifespan=lifespan, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(LIMIT_S)
        listener.close()


_TAKEN: list[socket.socket] = []


def nowhere() -> str:
    """A URL at which nobody listens, and nobody else can: the port stays taken."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    _TAKEN.append(taken)
    return f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextlib.contextmanager
def hanging_up() -> Iterator[str]:
    """The URL of one that reads a request and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Rig:
    """A proxy that runs, a client of it, and its engines' states."""

    url: str
    client: httpx.Client
    exchange: Exchange
    clock: Clock

    def complete(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json={"prompt": "hello", **body})

    def idle(self) -> bool:
        states = self.exchange.prefillers.states() + self.exchange.decoders.states()
        return not any(state.in_flight for state in states) and not self.exchange.counts.in_flight


@contextlib.contextmanager
def rig(
    prefill: list[FakeEngine | str], decode: list[FakeEngine | str], **options: Any
) -> Iterator[Rig]:
    """A proxy before engines; a string is the URL of one that is no `FakeEngine`."""
    with contextlib.ExitStack() as stack:

        def url_of(engine: FakeEngine | str) -> str:
            if isinstance(engine, str):
                return engine
            engine.url = stack.enter_context(served(engine))
            return engine.url

        channels = [
            engine.channel if isinstance(engine, FakeEngine) else f"tcp://other:{7100 + number}"
            for number, engine in enumerate(decode)
        ]
        config = ProxyConfig(
            prefillers=tuple(Engine(url_of(engine)) for engine in prefill),
            decoders=tuple(Engine(url_of(engine), ch) for engine, ch in zip(decode, channels)),
            **options,
        )
        clock = Clock()
        exchange = Exchange(config, now_s=clock)
        url = stack.enter_context(served(build(config, exchange=exchange), lifespan="on"))
        client = httpx.Client(base_url=url, trust_env=False, timeout=LIMIT_S)
        stack.enter_context(client)
        yield Rig(url, client, exchange, clock)
