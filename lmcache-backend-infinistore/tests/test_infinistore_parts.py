"""The parts that need no server: layout, messages, leftovers, the RDMA link over a fake client."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lmcache_backend_infinistore import link, reading, wire, writing
from lmcache_backend_infinistore.layout import HEAD_BYTES, Head, head_name, new_version
from lmcache_backend_infinistore.leftovers import Leftovers
from lmcache_backend_infinistore.link import Absent, Mapped, NoRoom, RdmaLink
from lmcache_backend_infinistore.reading import Lost
from lmcache_backend_infinistore.wire import Code, Entry, Item, Op, Phase
from lmcache_conformance.rig import Count

KEYS = st.binary(min_size=1, max_size=64)
COUNTS = st.integers(0, 2**64 - 1)


@given(KEYS, st.binary(min_size=12, max_size=12), COUNTS, COUNTS)
def test_a_head_is_read_as_it_was_written(key: bytes, version: bytes, n: int, check: int) -> None:
    head = Head(version, n, check)
    data = head.encode(key)
    assert len(data) == HEAD_BYTES and Head.decode(key, data) == head
    assert Head.decode(key + b"x", data) is None, "another key's"
    for at in range(len(data)):
        assert Head.decode(key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
    assert Head.decode(key, data[:-1]) is None and Head.decode(key, b"") is None


@given(st.lists(st.builds(Item, KEYS, st.integers(0, 2**32 - 1), COUNTS, COUNTS), max_size=64))
def test_a_request_is_read_as_it_was_written(items: list[Item]) -> None:
    message = wire.request(Op.PUT, items)
    assert message[0] == Op.PUT and wire.items_of(memoryview(message)) == items
    assert len(message) <= wire.MAX_MESSAGE_BYTES


def test_the_largest_request_and_the_board_have_room() -> None:
    longest = Item(f"{head_name(bytes(64))}:{new_version().hex()}".encode())
    assert len(wire.request(Op.SWEEP, [longest] * wire.MAX_ITEMS)) <= wire.MAX_MESSAGE_BYTES
    board = memoryview(bytearray(wire.BOARD_BYTES))
    entry = Entry(Code.CORRUPT, Phase.HEAD, 2**63, b"v" * 12)
    wire.note(board, wire.MAX_ITEMS - 1, entry)
    assert wire.read_board(board, wire.MAX_ITEMS)[-1] == entry
    assert wire.read_board(board, 1) == [Entry()]


def test_leftovers_are_bounded_due_in_time_and_swept_by_one() -> None:
    now, counts = [0.0], {"leftovers_forgotten": Count(), "leftovers_swept": Count()}
    left = Leftovers(grace_s=5, clock=lambda: now[0], counter=counts.__getitem__)
    for number in range(4100):
        left.later(f"p{number}")
        left.sweep(f"b{number}")
    assert counts["leftovers_forgotten"].value == 8
    assert left.due() == []
    now[0] = 5.0
    assert [item.key for item in left.due()] == [b"p%d" % i for i in range(4, 68)]
    with pytest.raises(ConnectionError), left.to_sweep(1) as (_, items):
        assert len(items) == wire.MAX_ITEMS
        raise ConnectionError
    with left.to_sweep(1) as (_, again):
        assert again == items, "a sweep that failed is done again"
        errors: list[Exception] = []

        def other() -> None:
            try:
                with left.to_sweep(0.05):
                    pass
            except TimeoutError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(errors) == 1
    with left.to_sweep(1) as (_, others):
        assert not {item.key for item in others} & {item.key for item in items}


def test_a_payload_that_broke_off_is_overwritten_now_and_deleted_after_the_grace() -> None:
    now, counts = [0.0], {"leftovers_forgotten": Count(), "leftovers_swept": Count()}
    left = Leftovers(grace_s=5, clock=lambda: now[0], counter=counts.__getitem__)
    left.cover("payload")
    left.sweep("head")
    with left.to_sweep(1) as (covers, sweeps):
        assert [[item.key for item in items] for items in (covers, sweeps)] == [
            [b"payload"], [b"head"],
        ]  # fmt: skip
        left.sweep("head")
    now[0] = 4.9
    with left.to_sweep(1) as (covers, sweeps):
        assert not covers and not [item for item in sweeps if item.key == b"payload"]
    now[0] = 5.0
    with left.to_sweep(1) as (covers, sweeps):
        assert not covers and [item.key for item in sweeps] == [b"payload"]
    with left.to_sweep(1) as nothing:
        assert nothing == ([], [])


def test_what_breaks_off_while_it_is_swept_is_swept_again() -> None:
    now, counts = [0.0], {"leftovers_swept": Count()}
    left = Leftovers(grace_s=5, clock=lambda: now[0], counter=counts.__getitem__)
    left.sweep("head")
    with left.to_sweep(1):
        now[0] = 1.0
        left.sweep("head")
    with left.to_sweep(1) as (_, sweeps):
        assert [item.key for item in sweeps] == [b"head"]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("name", ["k", "lmc", "four", "lmc:00", head_name(bytes(64))])
def test_a_read_asks_as_the_library_does(
    pair: tuple[socket.socket, socket.socket], name: str
) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("<II", 200, 7) + b"payload")
    assert reading.ask(ours, name) == 7
    room = bytearray(7)
    reading.receive(ours, memoryview(room))
    assert room == b"payload"
    asked = theirs.recv(4096)
    magic, op, nbytes = struct.unpack_from("<IcI", asked)
    assert (magic, op, nbytes) == (0xDEADBEEF, b"L", len(asked) - 9) and nbytes % 4 == 0
    # As the library's put, see HALF_PUT, but for the operation and the length.
    put = bytes.fromhex("1000000000000a00100008000c0007000a0000000000005008000000b80b0000")
    assert asked[9:41] == put[:23] + b"G" + put[24:28] + bytes(4)
    text = name.encode()
    assert asked[41:] == struct.pack("<I", len(text)) + text + bytes(4 - len(text) % 4)


def test_a_read_that_finds_nothing_or_breaks_off(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("<I", 404))
    assert reading.ask(ours, "absent") is None
    theirs.sendall(struct.pack("<II", 200, 600_000) + bytes(600_000))
    assert reading.ask(ours, "long") == 600_000
    reading.skip(ours, 600_000)
    theirs.sendall(struct.pack("<I", 503))
    with pytest.raises(Lost, match="503"):
        reading.ask(ours, "refused")
    theirs.sendall(struct.pack("<II", 200, 7) + b"pay")
    assert reading.ask(ours, "half") == 7
    theirs.close()
    with pytest.raises(Lost):
        reading.receive(ours, memoryview(bytearray(7)))
    with pytest.raises(Lost):
        reading.ask(ours, "gone")


PUT = bytes.fromhex("1000000000000a00100008000c0007000a0000000000005008000000")
"""The start of a put as the library frames it: see HALF_PUT."""


def framed_put(name: str, nbytes: int) -> bytes:
    text = name.encode()
    fields = struct.pack("<II", nbytes, len(text))
    body = PUT + fields + text + bytes(4 - len(text) % 4)
    return struct.pack("<IcI", 0xDEADBEEF, b"L", len(body)) + body


def test_a_short_value_is_one_message_as_the_library_frames_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(struct.pack("<I", 200))
    assert writing.store(ours, "lmc:00", b"head")
    assert theirs.recv(4096) == framed_put("lmc:00", 4) + b"head"
    theirs.sendall(struct.pack("<I", 507))
    assert not writing.store(ours, "full", b"head")
    theirs.sendall(struct.pack("<I", 400))
    with pytest.raises(Lost, match="400"):
        writing.store(ours, "odd", b"head")


@pytest.mark.parametrize(("code", "there"), [(200, 0), (200, 1), (507, 1)])
def test_a_payload_goes_with_the_question_for_another_name(
    pair: tuple[socket.socket, socket.socket], code: int, there: int
) -> None:
    ours, theirs = pair
    content = random.Random(0).randbytes(300_001)
    theirs.sendall(struct.pack("<III", 200, there, code))
    seen = bytearray()
    source = memoryview(content)
    assert writing.store_payload(ours, "payload", source, seen.extend, "head") == (
        code == 200,
        there == 0,
    )
    assert seen == content, "each byte once, in order"
    asked = struct.pack("<IcI", 0xDEADBEEF, b"C", 4) + b"head"
    due = asked + framed_put("payload", len(content)) + content
    ours.close()
    with theirs.makefile("rb") as stream:
        assert stream.read() == due


@pytest.mark.parametrize("answered", range(12))
@pytest.mark.parametrize("taken", [0, 40, 100_000, 8 << 20])
def test_a_put_that_nobody_acknowledges_is_lost(
    pair: tuple[socket.socket, socket.socket], answered: int, taken: int
) -> None:
    """The server dies when it has taken so many bytes, and has sent so many of its answer's 12."""
    ours, theirs = pair

    def serve() -> None:
        left = taken
        while left > 0 and (data := theirs.recv(min(left, 1 << 20))):
            left -= len(data)
        theirs.sendall(struct.pack("<III", 200, 1, 200)[:answered])
        theirs.close()

    content = memoryview(bytes(8 << 20))
    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(Lost):
        writing.store_payload(ours, "p", content, bool, "h")
    with pytest.raises(Lost):
        writing.store(ours, "h", b"head")
    thread.join()


def test_a_refusal_is_heard_though_the_server_hung_up_before_the_bytes_were_sent(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair

    def serve() -> None:
        theirs.recv(64)
        theirs.sendall(struct.pack("<III", 200, 1, 507))
        theirs.close()  # with much unread: a reset

    thread = threading.Thread(target=serve)
    thread.start()
    content = memoryview(bytes(64 << 20))
    assert writing.store_payload(ours, "p", content, bool, "h") == (False, False)
    thread.join()


class FakeRdma:
    """As far as the library's Python side tells what RDMA does."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.registered: list[tuple[int, int]] = []
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.error: Exception | None = None

    def connect(self) -> None:
        self.registered = []

    def close(self) -> None:
        pass

    def check_exist(self, name: str) -> bool:
        return name in self.stored

    def register_mr(self, address: int, nbytes: int) -> None:
        self.registered.append((address, nbytes))

    async def rdma_write_cache_async(self, blocks: Any, nbytes: int, base: int) -> None:
        if self.error:
            raise self.error
        ((name, offset),) = blocks
        self.stored[name] = self.memory[base][offset : offset + nbytes].tobytes()

    async def rdma_read_cache_async(self, blocks: Any, nbytes: int, base: int) -> None:
        ((name, offset),) = blocks
        if name not in self.stored:
            raise KeyError(name)
        data = np.frombuffer(self.stored[name][:nbytes], np.uint8)
        self.memory[base][offset : offset + len(data)] = data


def test_rdma_moves_payloads_between_registered_memory_and_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a fake of the client: no RDMA device has run this."""
    fake = FakeRdma()
    sock = SimpleNamespace(setsockopt=lambda *a: None, close=lambda: None)
    monkeypatch.setattr(link, "_socket_to", lambda host, port: sock)
    api = SimpleNamespace(
        TYPE_RDMA="RDMA", ClientConfig=lambda **given: given, InfiniStoreKeyNotFound=KeyError,
        InfinityConnection=lambda config: fake,
    )  # fmt: skip
    settings = {"host": "h", "port": 1, "rdma_device": "d", "link_type": "IB", "ib_port": 1}
    rdma = RdmaLink(api, settings)
    rdma.connect()
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8192)
    mapped = Mapped.of(fd, 8192)
    os.close(fd)
    fake.memory[mapped.address] = mapped.array
    rdma.share(mapped)
    assert fake.registered == [(mapped.address, 8192)]
    rdma.connect()
    assert fake.registered == [(mapped.address, 8192)], "again, for the new connection"
    mapped.array[100:200] = 7
    checksum = xxhash.xxh3_64_intdigest(b"\7" * 100)
    assert rdma.write_payload("p", mapped, 100, 100, "p") == (checksum, False)
    assert rdma.write_payload("q", mapped, 100, 100, "p") == (checksum, True)
    assert rdma.read_payload("p", mapped, 4096, 100) == checksum
    assert (mapped.array[4096:4196] == 7).all()
    with pytest.raises(Absent):
        rdma.read_payload("none", mapped, 0, 100)
    for text, kind in (("ret = 507", NoRoom), ("ret = 503", Lost)):
        fake.error = RuntimeError(text)
        with pytest.raises(kind):
            rdma.write_payload("q", mapped, 0, 100, "p")
    rdma.unshare(mapped)
    assert fake.registered == []
