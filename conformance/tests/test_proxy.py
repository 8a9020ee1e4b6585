"""The fault proxy, before it judges anything."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from lmcache_conformance import FaultProxy


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(sock: socket.socket) -> None:
            with sock:
                try:
                    while data := sock.recv(65536):
                        sock.sendall(data)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(sock,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[FaultProxy]:
    with FaultProxy(echo) as proxy:
        yield proxy


def dial(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    got = b""
    while len(got) < len(data) and (part := sock.recv(65536)):
        got += part
    return got


def test_it_forwards_and_counts_round_trips(proxy: FaultProxy) -> None:
    with dial(proxy) as sock:
        assert [ask(sock, b"one"), ask(sock, b"three")] == [b"one", b"three"]
    assert (proxy.sent_bytes, proxy.reply_bytes, proxy.turns) == (8, 8, 2)


def test_a_cut_falls_on_the_byte(proxy: FaultProxy) -> None:
    proxy.faults.cut_reply_after_bytes = 3
    with dial(proxy) as sock:
        assert ask(sock, b"abcdef") == b"abc"
    proxy.faults.cut_reply_after_bytes = -1
    with dial(proxy) as sock:
        assert ask(sock, b"xyz") == b"xyz", "a new connection works again"


def test_a_stall_keeps_the_connection(proxy: FaultProxy) -> None:
    with dial(proxy) as sock:
        proxy.faults.stalled = True
        sock.sendall(b"abc")
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(3)
        proxy.faults.stalled = False
        sock.settimeout(5)
        assert sock.recv(3) == b"abc"


def test_delay_and_bandwidth_take_time(proxy: FaultProxy) -> None:
    with dial(proxy) as sock:
        proxy.faults.delay_s = 0.05
        start = time.monotonic()
        ask(sock, b"abc")
        assert time.monotonic() - start >= 0.1
        proxy.faults.delay_s, proxy.faults.bytes_per_s = 0.0, 1000.0
        start = time.monotonic()
        ask(sock, bytes(100))
        assert time.monotonic() - start >= 0.2


def test_hanging_up_and_refusing(proxy: FaultProxy) -> None:
    with dial(proxy) as sock:
        assert ask(sock, b"a") == b"a"
        proxy.hang_up()
        assert sock.recv(1) == b""
    proxy.faults.refuse = True
    with dial(proxy) as sock:
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass


def test_a_reply_arrives_in_pieces(proxy: FaultProxy) -> None:
    proxy.faults.reply_piece_bytes = 2
    with dial(proxy) as sock:
        sock.sendall(b"hello")
        first = sock.recv(65536)
        got = first
        while len(got) < 5:
            got += sock.recv(65536)
    assert got == b"hello" and len(first) < 5
