"""What strangers, broken clients and slow readers can do: nothing to the others."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_support import (
    SLOT_BYTES,
    Client,
    Raw,
    assert_nothing_is_held,
    client,
    keys_of,
    running,
    serving,
    until,
)

from lmcache_core.cli.serve import node_status
from lmcache_core.layout import ChunkLayout
from lmcache_core.node import connection, protocol, server
from lmcache_core.node.address import Address
from lmcache_core.node.protocol import VERSION, Frames, ProtocolError, frame
from lmcache_core.sdk import BackendUnavailable, ConfigError
from lmcache_core.tokens import make_token, read_token

KEY, OTHER_KEY = keys_of("k", 2)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[server.NodeServer, str]]:
    with running(tmp_path_factory.mktemp("node")) as found:
        yield found


@pytest.fixture(scope="module")
def bystander(node: tuple[server.NodeServer, str]) -> Iterator[Client]:
    with client(node[1]) as made:
        made.store(keys_of("bystander", 3))
        yield made


def counted(node: tuple[server.NodeServer, str], name: str) -> int:
    return node[0].engine.metrics.snapshot().get(f"node.{name}", 0)


def sessions(node: tuple[server.NodeServer, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node_status(node[1], "")["sessions"]
    return found


def slots(node: tuple[server.NodeServer, str]) -> int:
    return sum(session["slots"] for session in sessions(node))


def packed(*offsets: int) -> bytes:
    return protocol.pack_offsets(offsets)


WRONG: dict[str, bytes] = {
    "no message": frame(protocol.Ask())[:4] + b"\xff" * 2,
    "not msgpack": struct.pack("<I", 3) + b"abc",
    "empty": struct.pack("<I", 0),
    "a frame over the limit": struct.pack("<I", protocol.MAX_FRAME_BYTES + 1),
    "a second greeting": frame(protocol.Hello(VERSION, "engine")),
    "an answer": frame(protocol.Pending(1)),
    "a slot that is not ours": frame(protocol.Commit(packed(0))),
    "slots that are not ours": frame(protocol.Abort(packed(4096, 8192))),
    "half an offset": frame(protocol.Abort(b"1234567")),
    "a ticket that is not open": frame(protocol.Release(7)),
    "half a key": frame(protocol.Touch(b"x" * 47)),
    "a negative ticket": frame(protocol.Prefetch(-1, 0, KEY, None, 1.0)),
    "no such layout": frame(protocol.Prefetch(1, 1, KEY, None, 1.0)),
    "a key twice": frame(protocol.Prefetch(1, 0, KEY * 2, None, 1.0)),
    "its own parent": frame(protocol.Prefetch(1, 0, KEY, KEY, 1.0)),
    "a short parent": frame(protocol.Prefetch(1, 0, KEY, b"short", 1.0)),
    "no deadline": frame(protocol.Prefetch(1, 0, KEY, None, float("nan"))),
    "a deadline of years": frame(protocol.Prefetch(1, 0, KEY, None, 1e9)),
    "a slot before itself": frame(protocol.Reserve(1, (protocol.Run(KEY, KEY, 0, False),))),
    "the same slot twice": frame(protocol.Reserve(1, (protocol.Run(KEY * 2, None, 0, False),))),
    "a slot of no layout": frame(protocol.Reserve(1, (protocol.Run(KEY, None, 9, False),))),
    "too many slots": frame(
        protocol.Reserve(1, (protocol.Run(KEY * (protocol.MAX_WANTED + 1), None, 0, False),))
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_client_that_says_something_wrong_is_heard_no_more(
    node: tuple[server.NodeServer, str], bystander: Client, what: str
) -> None:
    before = counted(node, "protocol_errors")
    raw = Raw(node[1])
    assert isinstance(raw.hello(), protocol.Welcome)
    raw.say(frame(protocol.Reserve(5, (protocol.Run(OTHER_KEY, None, 0, False),))))
    (offset,) = protocol.unpack_offsets(raw.answer().answers)
    raw.say(WRONG[what])
    assert raw.answer() is None, "our half is shut"
    assert counted(node, "protocol_errors") == before + 1
    # Its slot is its own until its end: it may be writing it.
    raw.say(frame(protocol.Abort(packed(offset))))
    assert bystander.load(keys_of("bystander", 3)) == 3
    assert slots(node) == 1
    raw.close()
    until(lambda: slots(node) == 0)


def test_errors_in_a_prefix_open_nothing(node: tuple[server.NodeServer, str]) -> None:
    raw = Raw(node[1])
    raw.hello()
    raw.say(frame(protocol.Prefetch(1, 0, KEY, None, 1.0)))
    assert raw.answer().ticket == 1
    raw.say(frame(protocol.Prefetch(1, 0, OTHER_KEY, None, 1.0)))
    assert raw.answer() is None
    until(lambda: [s["tickets"] for s in sessions(node)].count(1) == 1)
    raw.close()


def test_another_version_is_told_what_to_install(node: tuple[server.NodeServer, str]) -> None:
    raw = Raw(node[1])
    refused = raw.hello(version=VERSION + 1)
    assert refused.reason == "version"
    assert "pip install 'lmcache-core==" in refused.hint
    assert raw.answer() is None
    raw.close()


def test_fields_of_a_later_version_are_no_error(node: tuple[server.NodeServer, str]) -> None:
    raw = Raw(node[1])
    body = msgspec.msgpack.encode([1, VERSION + 1, "engine", "", "", 1, [], "new", 5])
    raw.say(struct.pack("<I", len(body)) + body)
    assert raw.answer().reason == "version"
    raw.close()


@pytest.mark.parametrize("first", [frame(protocol.Ask()), frame(protocol.Release(1))])
def test_whoever_does_not_greet_is_not_heard(
    node: tuple[server.NodeServer, str], first: bytes
) -> None:
    raw = Raw(node[1])
    raw.say(first)
    assert raw.answer() is None
    raw.close()


@pytest.mark.parametrize("role", ["control", "worker"])
def test_only_engines_ask_for_chunks(node: tuple[server.NodeServer, str], role: str) -> None:
    with client(node[1]) as one:
        raw = Raw(node[1])
        assert raw.hello(role, session=one.cache.handle.session).incarnation
        raw.say(frame(protocol.Prefetch(1, 0, KEY, None, 1.0)))
        assert raw.answer() is None
        raw.close()


def test_whoever_is_slow_to_greet_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "GREETING_S", 0.1)
    with running(tmp_path) as (found, path):
        raw = Raw(path)
        raw.say(b"\x10")
        assert raw.answer() is None
        assert found.engine.metrics.snapshot()["node.refused.slow"] == 1


def test_chunks_that_do_not_fit_are_refused_at_once(node: tuple[server.NodeServer, str]) -> None:
    huge = ChunkLayout(chunk_size=16, payload_bytes=64 * SLOT_BYTES, description=b"huge")
    with pytest.raises(ConfigError, match="one chunk takes") as caught:
        Client(node[1], layouts=(huge,))
    assert "host tier" in caught.value.hint


def test_so_many_sessions_and_no_more(tmp_path: Path) -> None:
    with running(tmp_path, max_sessions=2) as (_, path), client(path), client(path):
        with pytest.raises(BackendUnavailable, match="too many sessions"):
            Client(path)
        assert Raw(path).hello("control").incarnation, "there is room to look"


def test_another_user_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, uid_of=lambda sock: 12345) as (found, path):
        with pytest.raises(BackendUnavailable):
            Client(path)
        assert found.engine.metrics.snapshot()["node.refused.uid"] == 1


def test_tcp_asks_for_the_token(tmp_path: Path) -> None:
    file = str(tmp_path / "token")
    with serving(tmp_path, "--listen", "tcp://127.0.0.1:0", "--token-file", file) as node:
        assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
        address = node.ready["listening"][1]
        with client(address, node_token_file=file) as one, client(node.socket) as two:
            assert one.store(keys_of("a", 3)) == 3
            assert two.load(keys_of("a", 3)) == 3
        with pytest.raises(ConfigError, match="asks for a token"):
            Client(address)
        (tmp_path / "other").write_text("x" * 64)
        (tmp_path / "other").chmod(0o600)
        with pytest.raises(ConfigError, match="token is wrong"):
            Client(address, node_token_file=str(tmp_path / "other"))
        assert node.counter("node.refused.token") == 1


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = make_token(str(file))
    assert make_token(str(file)) == read_token(str(file)) == token
    file.chmod(0o640)
    for read in (make_token, read_token):
        with pytest.raises(ConfigError, match="others can read") as caught:
            read(str(file))
        assert caught.value.hint == f"chmod 600 {file}"
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="less than"):
        read_token(str(file))
    with pytest.raises(ConfigError, match="can't be read"):
        read_token(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/run/x.sock", "/run/x.sock"),
        ("unix:///run/x.sock", "/run/x.sock"),
        ("tcp://127.0.0.1:9250", "tcp://127.0.0.1:9250"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "x.sock", "unix://x", "http://h:1", "tcp://h:1/x", "tcp://h:x"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        Address.parse(text)


def test_a_client_that_does_not_read_is_muted_and_the_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, host_bytes=64 * SLOT_BYTES) as node, client(node.socket) as bystander:
        bystander.store(keys_of("a", 5))
        raw = Raw(node.socket)
        raw.hello()
        raw.say(frame(protocol.Reserve(5, (protocol.Run(KEY, None, 0, False),))))
        before = node.rss_bytes()
        raw.sock.setblocking(False)
        asking, waits_s = bytearray(), []
        end_s = time.monotonic() + 20
        while not node.counter("node.overflows") and time.monotonic() < end_s:
            asking += frame(protocol.Ask()) * 30_000
            try:
                del asking[: raw.sock.send(asking)]
            except BlockingIOError:
                pass
            start_s = time.monotonic()
            assert bystander.load(keys_of("a", 5)) == 5
            waits_s.append(time.monotonic() - start_s)
        assert node.counter("node.overflows") == 1
        assert max(waits_s) < 0.25
        assert node.rss_bytes() - before < 2 * connection.MAX_UNSENT_BYTES
        sessions = {session["slots"] for session in node.status()["sessions"]}
        assert sessions == {0, 1}, "it may still write what it was given"
        raw.close()
        until(lambda: len(node.status()["sessions"]) == 1)
        assert bystander.reserve([KEY])[0] is not None


def test_what_one_client_says_is_handled_in_turns() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(frame(protocol.Ask()) * 200)
        found = connection.Connection(ours)
        sizes = [len(found.read() or ())]
        while found.has_more:
            sizes.append(len(found.read() or ()))
        assert sizes == [64, 64, 64, 8]


@given(st.binary(max_size=400), st.lists(st.integers(1, 60), max_size=20))
def test_frames_do_not_depend_on_how_they_are_cut(tail: bytes, cuts: list[int]) -> None:
    bodies = [bytes([i]) * i for i in range(12)]
    stream = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    frames, found = Frames(100), []
    for size in [*cuts, len(stream)]:
        found += frames.feed(stream[:size])
        stream = stream[size:]
    assert found == bodies
    try:
        list(frames.feed(tail))
    except ProtocolError:
        pass


NUMBERS = st.integers(-2, 5) | st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
KEYS = st.lists(st.sampled_from(keys_of("fuzz", 4)), max_size=6).map(b"".join)
KEYS |= st.binary(max_size=100)
PARENTS = st.none() | st.sampled_from(keys_of("fuzz", 4)) | st.binary(max_size=50)
OFFSETS = st.lists(st.integers(0, 8), max_size=4).map(
    lambda slots: packed(*(slot * SLOT_BYTES for slot in slots))
) | st.binary(max_size=20)
RUNS = st.builds(protocol.Run, KEYS, PARENTS, NUMBERS, st.booleans())
MESSAGES = st.one_of(
    st.builds(protocol.Prefetch, NUMBERS, NUMBERS, KEYS, PARENTS, st.floats(-1, 2)),
    st.builds(protocol.Release, NUMBERS),
    st.builds(protocol.Reserve, NUMBERS, st.lists(RUNS, max_size=4).map(tuple)),
    st.builds(protocol.Commit, OFFSETS),
    st.builds(protocol.Abort, OFFSETS),
    st.builds(protocol.Touch, KEYS),
    st.builds(protocol.Forget, KEYS),
    st.builds(protocol.Ask),
    st.builds(protocol.Hello, NUMBERS, st.sampled_from(["engine", "worker", "control", "x"])),
).filter(lambda message: encodes(message))


def encodes(message: Any) -> bool:
    """msgpack has no numbers over 64 bits."""
    try:
        frame(message)
    except OverflowError:
        return False
    return True


def mangled(message: Any, rng: random.Random) -> bytes:
    """Its frame, sometimes with a byte changed, cut or doubled."""
    data = bytearray(frame(message))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        position = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[position] ^= 1 << rng.randrange(8)
            case 1:
                del data[position:]
            case _:
                data[position:position] = data[:position]
        if not data:
            break
    return bytes(data)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    greets=st.booleans(),
    said=st.lists(MESSAGES, max_size=8),
    noise=st.binary(max_size=40),
    seed=st.integers(0, 1 << 16),
)
def test_whatever_a_client_says_the_others_are_unharmed(
    node: tuple[server.NodeServer, str],
    bystander: Client,
    greets: bool,
    said: list[Any],
    noise: bytes,
    seed: int,
) -> None:
    rng = random.Random(seed)
    raw = Raw(node[1])
    if greets:
        raw.hello()
    try:
        for message in said:
            raw.say(mangled(message, rng))
        raw.say(noise)
        raw.sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    raw.close()
    assert bystander.load(keys_of("bystander", 3)) == 3
    until(lambda: len(sessions(node)) == 1, "the end of the session")
    until(lambda: bystander.cache.poll() or sessions(node)[0]["tickets"] == 0)
    assert_nothing_is_held(node_status(node[1], ""), 1)
