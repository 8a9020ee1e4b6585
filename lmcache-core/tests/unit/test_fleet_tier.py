"""Peers that a controller names, as a store: asked in time, never trusted, never missed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from agent_rig import TOKEN

from lmcache_core.agent import wire
from lmcache_core.agent.peers import FleetConnector
from lmcache_core.config import EngineConfig
from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.layout import ChunkLayout
from lmcache_core.opening import open_chunks
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    Buffer,
    ConfigError,
    OpContext,
    Status,
    Unsupported,
)

KEYS = [bytes([number]) * 46 for number in range(4)]


class Directory:
    """Answers ``/v1/where``: chunk -> address, as the test says."""

    def __init__(self) -> None:
        self.holders: dict[bytes, str] = {}
        self.asked: list[wire.WhereRequest] = []
        self.status = 200
        self.garbled: Callable[[wire.WhereReply], wire.WhereReply] = lambda reply: reply
        self.thawed = threading.Event()
        self.thawed.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.thawed.wait(5)
                assert self.path == wire.WHERE_PATH
                assert self.headers["authorization"] == f"Bearer {TOKEN}"
                answer = msgspec.msgpack.encode(outer.answer(body))
                self.send_response(outer.status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, body: bytes) -> wire.WhereReply:
        asked = msgspec.msgpack.decode(body, type=wire.WhereRequest)
        self.asked.append(asked)
        peers = tuple(dict.fromkeys(self.holders.values()))
        holder = tuple(
            peers.index(self.holders[key]) if key in self.holders else -1
            for key in wire.split(asked.keys)
        )
        return self.garbled(wire.WhereReply(peers=peers, holder=holder))

    def close(self) -> None:
        self.thawed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def directory() -> Iterator[Directory]:
    it = Directory()
    yield it
    it.close()


def connector(*urls: str, peers: dict[str, MemoryConnector] | None = None) -> FleetConnector:
    def open_peer(address: str) -> MemoryConnector:
        return (peers or {})[address]

    return FleetConnector("me", urls, token=TOKEN, ca_file="", open_peer=open_peer, max_batch=64)


def within(seconds: float = 2.0) -> OpContext:
    return OpContext(deadline_s=time.monotonic() + seconds)


def buffers(count: int, nbytes: int = 64) -> tuple[list[bytearray], list[Buffer]]:
    memory = [bytearray(nbytes) for _ in range(count)]
    return memory, [Buffer(memoryview(one), 0, nbytes) for one in memory]


def holding(values: dict[bytes, bytes]) -> MemoryConnector:
    peer = MemoryConnector()
    peer._values.update(values)
    return peer


def test_each_chunk_is_read_from_the_peer_that_was_named(directory: Directory) -> None:
    first, second = holding({KEYS[0]: b"a" * 64}), holding({KEYS[2]: b"c" * 64})
    directory.holders = {KEYS[0]: "one", KEYS[2]: "two"}
    fleet = connector(directory.url, peers={"one": first, "two": second})
    answers = fleet.exists(KEYS, within())
    assert answers == [Status.OK, Status.MISS, Status.OK, Status.MISS]
    memory, targets = buffers(4)
    results = fleet.get_into(KEYS, targets, within())
    assert [result.status for result in results] == answers
    assert (bytes(memory[0]), bytes(memory[2])) == (b"a" * 64, b"c" * 64)
    assert directory.asked[0].instance == "me"


def test_a_peer_that_lacks_what_was_said_is_a_miss_and_forgotten(directory: Directory) -> None:
    directory.holders = {KEYS[0]: "one"}
    empty = holding({})
    fleet = connector(directory.url, peers={"one": empty})
    assert fleet.exists(KEYS[:1], within()) == [Status.OK]
    for _ in range(2):
        assert fleet.get_into(KEYS[:1], buffers(1)[1], within())[0].status is Status.MISS


def test_what_nobody_was_asked_about_is_a_miss(directory: Directory) -> None:
    fleet = connector(directory.url)
    assert fleet.get_into(KEYS[:1], buffers(1)[1], within())[0].status is Status.MISS
    assert not directory.asked


def test_the_next_controller_answers_when_one_is_away(directory: Directory) -> None:
    directory.holders = {KEYS[0]: "one"}
    fleet = connector("http://127.0.0.1:1", directory.url)
    assert fleet.exists(KEYS[:1], within()) == [Status.OK]
    assert fleet.health(within()).ok


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_controller_that_refuses_is_unavailable(directory: Directory, status: int) -> None:
    directory.status = status
    with pytest.raises(BackendUnavailable):
        connector(directory.url).exists(KEYS, within())


def test_without_any_controller_it_is_unavailable() -> None:
    with pytest.raises(BackendUnavailable, match="no controller"):
        connector("http://127.0.0.1:1").exists(KEYS, within())


def test_a_frozen_controller_costs_the_deadline(directory: Directory) -> None:
    directory.thawed.clear()
    fleet = connector(directory.url)
    start_s = time.monotonic()
    with pytest.raises(BackendUnavailable):
        fleet.exists(KEYS, within(0.2))
    assert time.monotonic() - start_s < 1.0


def cut(reply: wire.WhereReply) -> wire.WhereReply:
    return msgspec.structs.replace(reply, holder=reply.holder[:-1])


def out_of_range(reply: wire.WhereReply) -> wire.WhereReply:
    return msgspec.structs.replace(reply, holder=(7, -9, 1 << 40, 0))


def test_an_answer_about_other_chunks_fails(directory: Directory) -> None:
    directory.garbled = cut
    assert connector(directory.url).exists(KEYS, within()) == [Status.FAILED] * 4


def test_peers_that_are_not_there_are_misses(directory: Directory) -> None:
    directory.garbled = out_of_range
    assert connector(directory.url).exists(KEYS, within()) == [Status.MISS] * 4


def test_it_is_only_read(directory: Directory) -> None:
    fleet = connector(directory.url)
    with pytest.raises(Unsupported):
        fleet.put_from(KEYS[:1], buffers(1)[1], within())
    assert fleet.delete(KEYS, within()) == [Status.OK] * 4


def test_closed_it_says_so(directory: Directory) -> None:
    fleet = connector(directory.url)
    fleet.close()
    with pytest.raises(BackendClosed):
        fleet.exists(KEYS, within())


def test_many_threads_ask_at_once(directory: Directory) -> None:
    directory.holders = dict.fromkeys(KEYS, "one")
    fleet = connector(directory.url)
    found: list[Sequence[Status]] = []

    def ask() -> None:
        for _ in range(5):
            found.append(fleet.exists(KEYS, within(5)))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[Status.OK] * 4] * 60


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"ask_directory": True}, "ask_directory without a channel"),
        ({"ask_directory": True, "channel": "tcp://127.0.0.1:0"}, "ask_directory without contr"),
    ],
)
def test_settings_that_lack_something_are_refused(
    tmp_path: Any, wish: dict[str, Any], message: str
) -> None:
    from lmcache_core.tokens import make_token

    make_token(str(tmp_path / "token"))
    config = EngineConfig(
        host_bytes=1 << 20, channel_token_file=str(tmp_path / "token"), prefault=False, **wish
    )
    layout = ChunkLayout(chunk_size=4, payload_bytes=4096, description=b"x")
    with pytest.raises(ConfigError, match=message):
        open_chunks(config, layouts=[layout])
