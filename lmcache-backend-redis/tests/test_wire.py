"""RESP2 framing, with replies that arrive in any pieces."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_backend_redis.wire import PlainWire, ServerError, Session, WrongSize, command

TREES = st.recursive(
    st.none() | st.integers(-(2**62), 2**62) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


def encode(reply: Any) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n%b" % (len(reply), b"".join(map(encode, reply)))


def session_over(data: bytes, cuts: list[int]) -> tuple[Session, socket.socket]:
    """A session whose peer sends ``data`` in pieces that end at ``cuts``."""
    ours, theirs = socket.socketpair()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})

    def send() -> None:
        start = 0
        try:
            for end in ends:
                theirs.sendall(data[start:end])
                start = end
                if len(ends) < 20:
                    time.sleep(0.0005)
        except OSError:
            pass

    threading.Thread(target=send, daemon=True).start()
    return Session(PlainWire(ours)), theirs


def soon() -> float:
    return time.monotonic() + 5


@settings(deadline=None)
@given(st.lists(TREES, min_size=1, max_size=5), st.lists(st.integers(0, 400), max_size=6))
def test_replies_are_read_whatever_pieces_they_come_in(replies: list[Any], cuts: list[int]) -> None:
    session, peer = session_over(b"".join(map(encode, replies)), cuts)
    with peer:
        assert [session.reply(soon()) for _ in replies] == replies
    session.close()


@settings(deadline=None)
@given(
    st.lists(st.none() | st.binary(max_size=2000), min_size=1, max_size=4),
    st.lists(st.integers(0, 3000), max_size=6),
)
def test_values_land_in_the_target_and_nowhere_else(
    values: list[bytes | None], cuts: list[int]
) -> None:
    session, peer = session_over(b"".join(map(encode, values)), cuts)
    with peer:
        for value in values:
            memory = bytearray(b"\xa5" * (len(b"four" if value is None else value) + 2))
            whole = session.value_into(memoryview(memory)[1:-1], soon())
            assert whole is (value is not None)
            assert (memory[0], memory[-1]) == (0xA5, 0xA5)
            assert value is None or memory[1:-1] == value
    session.close()


@pytest.mark.parametrize("length", [0, 1, 9, 11, 12, 99, 100, 998, 1000, 1001, 100_000])
def test_a_value_of_another_length_is_told(length: int) -> None:
    session, peer = session_over(encode(bytes(length)), [])
    with peer, pytest.raises(WrongSize):
        session.value_into(memoryview(bytearray(999 if length > 900 else 10)), soon())
    session.close()


def test_errors_are_values_of_replies_and_exceptions_of_values() -> None:
    session, peer = session_over(b"-OOM no room\r\n-ERR\r\n", [3, 9])
    with peer:
        reply = session.reply(soon())
        assert isinstance(reply, ServerError) and reply.code == "OOM"
        session._start = session._end = 0
    session.close()
    session, peer = session_over(b"-LOADING wait\r\n", [2])
    with peer, pytest.raises(ServerError, match="LOADING"):
        session.value_into(memoryview(bytearray(10)), soon())
    session.close()


@pytest.mark.parametrize("data", [b"?\r\n", b"$70000\r\n", b"x" * 70_000, b"HTTP/1.1 400\r\n"])
def test_what_is_not_resp_or_too_long_ends_the_connection(data: bytes) -> None:
    session, peer = session_over(data, [])
    with peer, pytest.raises((ConnectionError, OSError)):
        session.reply(soon())
    session.close()


def test_deadlines_and_a_peer_that_goes() -> None:
    session, peer = session_over(b"", [])
    with peer:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            session.reply(start + 0.1)
        assert 0.1 <= time.monotonic() - start < 0.3
        with pytest.raises(TimeoutError):
            session.send([bytes(50 << 20)], time.monotonic() + 0.1)
        with pytest.raises(TimeoutError):
            session.send([b"x"], time.monotonic() - 1)
    with pytest.raises(OSError):
        session.reply(soon())
    session.close()


def test_commands_are_framed_by_length() -> None:
    assert command(b"GET", b"a\r\n", 12) == b"*3\r\n$3\r\nGET\r\n$3\r\na\r\n\r\n$2\r\n12\r\n"
