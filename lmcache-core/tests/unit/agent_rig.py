"""A scripted controller, and an engine with an agent that talks to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from scripted import Pages, prompt

from lmcache_core.agent import wire
from lmcache_core.agent.agent import About, Agent
from lmcache_core.agent.orders import Orders
from lmcache_core.engine import CacheEngine
from lmcache_core.sdk import ConfigError
from lmcache_core.tiers.remote import RemoteTier

TOKEN = "a-token-of-enough-letters"


class FakeController:
    """Follows one instance as a real one does, and hands out what a test puts into ``owed``.

    Attributes:
        held: (tier number, key) that the instance says it has.
        syncs: everything that came.
        owed: what the next answers say, one each.
        down: answers nothing but 503; ``frozen``: does not answer.
        lose: answers are thrown away after they took effect.
    """

    def __init__(self, port: int = 0) -> None:
        self.name = "c1"
        self.held: set[tuple[int, bytes]] = set()
        self.syncs: list[wire.Sync] = []
        self.owed: list[wire.Reply] = []
        self.progress: dict[str, wire.Progress] = {}
        self.answers: dict[str, wire.Answer] = {}
        self.models: list[wire.Model] = []
        self.namespaces: dict[bytes, wire.NamespaceNote] = {}
        self.down = self.lose = self.ask_again = False
        self.thawed = threading.Event()
        self.thawed.set()
        self.closed = False
        self.expected = 0
        self.refused = 0
        self.changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.thawed.wait(10)
                if outer.closed:
                    self.close_connection = True
                    return
                if self.headers["authorization"] != f"Bearer {TOKEN}":
                    outer.refused += 1
                    self._send(401, b"{}")
                elif outer.down:
                    self._send(503, b"{}")
                else:
                    answer = outer.take(msgspec.msgpack.decode(body, type=wire.Sync))
                    if outer.lose:
                        self.close_connection = True
                        return
                    self._send(200, msgspec.msgpack.encode(answer))

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def take(self, sync: wire.Sync) -> wire.Reply:
        """One sync, applied."""
        with self.changed:
            self.syncs.append(sync)
            if sync.reset:
                self.held.clear()
                self.expected = sync.seq
                self.models, self.namespaces = list(sync.models), {}
            gap = sync.seq != self.expected
            if not gap:
                for change in sync.changes:
                    for key in wire.split(change.keys):
                        one = (change.tier, key)
                        (self.held.add if change.present else self.held.discard)(one)
                self.expected += len(sync.changes)
            self.namespaces |= {note.tag: note for note in sync.namespaces}
            self.progress |= {one.id: one for one in sync.progress}
            self.answers |= {one.id: one for one in sync.answers}
            resync, self.ask_again = gap or self.ask_again, False
            reply = wire.Reply(controller=self.name, resync=resync)
            if self.owed and not gap:
                reply = msgspec.structs.replace(self.owed.pop(0), controller=self.name)
            self.changed.notify_all()
            return reply

    @property
    def last(self) -> wire.Sync:
        """What came last, or an empty one."""
        empty = wire.Sync(version=0, instance="none", incarnation="none", kind="node", seq=0)
        return self.syncs[-1] if self.syncs else empty

    def restart(self) -> None:
        """Another process in its place, which knows nothing."""
        with self.changed:
            self.name += "+"
            self.held.clear()
            self.expected = -1

    def until(self, ready: Callable[[], bool], limit_s: float = 5.0) -> None:
        """Wait until ``ready``, looked at after each sync."""
        with self.changed:
            assert self.changed.wait_for(ready, limit_s), "it did not come to pass"

    def close(self) -> None:
        self.closed = True
        self.thawed.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextlib.contextmanager
def joined(
    engine: CacheEngine,
    *controllers: FakeController,
    token: str = TOKEN,
    sync_s: float = 0.02,
    open_peer: Callable[[str], RemoteTier] | None = None,
    **about: Any,
) -> Iterator[Agent]:
    """``engine`` with its agent; nobody else polls it, as when vLLM is idle."""

    def turn() -> None:
        with engine.owner:
            engine.poll()

    def no_peer(address: str) -> RemoteTier:
        raise ConfigError("this instance has no channel", hint="set channel")

    agent = Agent(
        engine,
        About(name="e1", kind="embedded", **about),
        controllers=[controller.url for controller in controllers],
        token=token,
        ca_file="",
        metrics=engine.metrics,
        turn=turn,
        owner=engine.owner,
        open_peer=open_peer or no_peer,
        max_pinned_bytes=1 << 30,
        sync_s=sync_s,
    )
    engine.parts.append(agent)
    agent.start()
    try:
        yield agent
    finally:
        agent.close()


def truth(engine: CacheEngine) -> set[tuple[int, bytes]]:
    """What the engine's tiers hold."""
    with engine.owner:
        found = {(0, key) for key in engine.host.resident()}
        for number, tier in enumerate(engine.tiers.readable, 1):
            found |= {(number, key) for key in tier.resident()}
        return found


def settled(engine: CacheEngine, limit_s: float = 5.0) -> None:
    """Every write has ended, brought in by the agent's thread alone."""
    end_s = time.monotonic() + limit_s
    while engine.unsettled:
        assert time.monotonic() < end_s, "writes do not end"
        time.sleep(0.005)


def store(engine: CacheEngine, seed: int, chunks: int) -> list[bytes]:
    """Store a prompt as the owner; its keys."""
    with engine.owner:
        engine.store(prompt(seed, chunks), Pages(seed))
        return engine.keys(prompt(seed, chunks))


@pytest.fixture
def controller() -> Iterator[FakeController]:
    """Closed at the end."""
    it = FakeController()
    yield it
    it.close()


__all__ = ["TOKEN", "FakeController", "Orders", "controller", "joined", "settled", "store", "truth"]
