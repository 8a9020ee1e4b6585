"""What the library and its server do, and that nobody pays for it but one helper process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import pytest
from infinistore_support import GRACE_S, MIB, Open, until

from lmcache_backend_infinistore.conformance import RawClient
from lmcache_backend_infinistore.layout import Head, head_name, payload_name
from lmcache_backend_infinistore.reading import value_request
from lmcache_backend_infinistore.server import InfinistoreServer
from lmcache_conformance import FaultProxy, Memory, value, within
from lmcache_conformance.throwaway import Stopwatch
from lmcache_core.sdk import BackendUnavailable, GetResult, Status

HALF_PUT = bytes.fromhex(
    # One that the library sends: a value of 3000 bytes under "torn", of which 1000 follow.
    "efbeadde4c2c0000001000000000000a00100008000c0007000a0000000000005008000000b80b0000"
    "04000000746f726e00000000"
) + bytes(1000)


def current_payload(raw: RawClient, key: bytes) -> str:
    head = Head.decode(key, raw.read(head_name(key)))
    assert head is not None
    return payload_name(key, head.version)


def test_the_library_hangs_on_a_missing_key_and_we_say_miss(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        RawClient(shared_server.port, limit_s=1.5).read("nobody put it")
    it = opened(shared_server.url)
    with Stopwatch() as watch:
        assert it.get(b"nobody put it", 100)[0].status is Status.MISS
    assert watch.seconds < 1


def test_a_value_evicted_between_head_and_payload_is_a_miss(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    """The library's own read would wait for that payload for ever, and cost a helper."""
    raw = RawClient(shared_server.port)
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}?helpers=1")
        it.put(b"race", value(1, MIB))
        it.put(b"other", value(2, MIB))
        name = current_payload(raw, b"race")
        proxy.faults.delay_s = 0.4
        before, answers = proxy.turns, []
        thread = threading.Thread(target=lambda: answers.append(it.get(b"race", MIB, seconds=30)))
        thread.start()
        until(lambda: proxy.turns == before + 1)  # the head is asked for
        proxy.faults.stalled = True
        raw.delete(name)
        proxy.faults.stalled, proxy.faults.delay_s = False, 0.0
        thread.join()
        assert answers == [(GetResult(Status.MISS), b"")]
        assert proxy.turns > before + 1
        assert it.counts["helper_kills"] == 0 and it.counts["helper_starts"] == 1
        assert it.get(b"other", MIB)[1] == value(2, MIB)


def test_a_dead_server_kills_the_library_and_not_us(
    server: InfinistoreServer, opened: Open
) -> None:
    program = f"""
import infinistore, os
config = infinistore.ClientConfig(
    host_addr="127.0.0.1", service_port={server.port}, connection_type=infinistore.TYPE_TCP)
client = infinistore.InfinityConnection(config)
client.connect()
print("connected", flush=True)
input()
try:
    client.tcp_read_cache("k")
except Exception:
    pass
os._exit(77)
"""
    bare = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    it = opened(server.url)
    it.put(b"k", b"before")
    assert bare.stdout is not None
    assert b"connecting" in bare.stdout.readline()
    assert b"connected" in bare.stdout.readline()
    server.kill()
    bare.communicate(b"\n", timeout=20)
    assert bare.returncode not in (0, 77), "the library's process died of it"
    for _ in range(3):
        with Stopwatch() as watch, pytest.raises(BackendUnavailable) as caught:
            it.get(b"k", 100, seconds=2)
        assert caught.value.hint and watch.seconds < 2 + GRACE_S
    server.start()

    def put() -> bool:
        try:
            return it.put(b"k", b"again") is Status.OK
        except BackendUnavailable:
            return False

    until(put)
    assert it.get(b"k", 100)[1] == b"again", "without being opened again"
    assert "infinistore" not in sys.modules


def test_a_server_that_dies_in_the_middle_of_a_get(server: InfinistoreServer, opened: Open) -> None:
    it = opened(server.url)
    it.put(b"k", value(1, 8 * MIB))
    caught: list[Exception] = []

    def read() -> None:
        try:
            while True:
                assert it.get(b"k", 8 * MIB)[1] == value(1, 8 * MIB)
        except BackendUnavailable as error:
            caught.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    server.kill()
    thread.join(10)
    assert len(caught) == 1


def test_a_long_value_is_put_away_before_more_is_asked_for(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    """The server would send it for ever, to a request that comes too early."""
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}?helpers=1")
        for nbytes, connections in ((MIB, 1), (MIB + 1, 2), (4 * MIB, 2)):
            it.put(b"long", value(nbytes, nbytes))
            assert it.get(b"long", nbytes)[1] == value(nbytes, nbytes)
            assert proxy.connections == connections
        proxy.hang_up()
        assert it.get(b"long", 4 * MIB)[1] == value(4 * MIB, 4 * MIB)
        memory = Memory([2 * MIB])
        assert it.store.get_into([b"long"], memory.buffers(), within(5)) == [
            GetResult(Status.SIZE_MISMATCH, 4 * MIB)
        ]


def test_a_name_is_published_before_its_bytes_and_kills_the_server_that_is_asked(
    server: InfinistoreServer,
) -> None:
    """Why no name is read here before its put was acknowledged."""
    raw = RawClient(server.port, limit_s=5)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(HALF_PUT)
        time.sleep(0.3)
        assert raw.exists("torn"), "with 1000 of 3000 bytes"
        with pytest.raises(RuntimeError):
            raw.read("torn")
    assert "Stacktrace" in server.log()


def test_a_put_on_its_way_is_the_old_value_or_none(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    reader = opened(shared_server.url)
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        writer = opened(f"infinistore://127.0.0.1:{proxy.port}")
        reader.put(b"there", value(1, MIB))
        proxy.faults.bytes_per_s = 2e6
        found, done = set(), []

        def write() -> None:
            for key in (b"there", b"new"):
                done.append(writer.put(key, value(2, MIB)))

        thread = threading.Thread(target=write)
        thread.start()
        while thread.is_alive():
            for key in (b"there", b"new"):
                result, content = reader.get(key, MIB)
                found.add((key, result.status, content))
        assert done == [Status.OK, Status.OK]
    assert found <= {
        (b"there", Status.OK, value(1, MIB)), (b"there", Status.OK, value(2, MIB)),
        (b"new", Status.MISS, b""), (b"new", Status.OK, value(2, MIB)),
    }  # fmt: skip
    assert len(found) >= 3
    assert reader.get(b"new", MIB)[1] == value(2, MIB)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.99, 0.999])
def test_a_put_that_broke_off_is_swept_up(
    server: InfinistoreServer, opened: Open, share: float
) -> None:
    """The server would keep it for ever, and die of the first reader."""
    with FaultProxy(("127.0.0.1", server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}")
        it.put(b"k", value(1, 100_000))
        start = proxy.sent_bytes
        it.put(b"k", value(2, 100_000))
        total = proxy.sent_bytes - start
        proxy.faults.cut_after_bytes = proxy.sent_bytes + int(total * share)
        answers = []
        with contextlib.suppress(BackendUnavailable):
            answers.append(it.put(b"k", value(3, 100_000), seconds=2))
        proxy.faults.cut_after_bytes = -1
        assert answers in ([], [Status.TIMED_OUT])
        result, content = it.get(b"k", 100_000)
        assert result.status is Status.MISS or content in (value(2, 100_000), value(3, 100_000))
        assert it.counts["leftovers_swept"] >= (share > 0.05)
        assert it.put(b"k", value(4, 100_000)) is Status.OK
        assert it.get(b"k", 100_000)[1] == value(4, 100_000)
    assert "Stacktrace" not in server.log()


def test_a_relay_hands_on_a_part_of_a_put_long_after_it_broke_off(
    server: InfinistoreServer, opened: Open
) -> None:
    """A delete just then would be the server's end."""
    it = opened(f"{server.url}?longest_deadline_s=1")
    name = payload_name(b"late", b"v" * 12)
    it.store._leftovers.cover(name)
    assert it.put(b"k", value(1, 5000)) is Status.OK
    assert it.counts["leftovers_swept"] == 1
    with socket.create_connection(("127.0.0.1", server.port)) as late:
        late.sendall(value_request(b"P", name, 100_000) + bytes(50_000))
        time.sleep(0.2)
    end_s = time.monotonic() + 10
    while it.counts["leftovers_swept"] < 2:
        assert it.get(b"k", 5000)[1] == value(1, 5000)
        assert time.monotonic() < end_s, "it is never deleted"
        time.sleep(0.05)
    assert it.get(b"k", 5000)[1] == value(1, 5000)
    assert "Stacktrace" not in server.log()


def test_a_put_whose_answers_break_off_anywhere(server: InfinistoreServer, opened: Open) -> None:
    """One that replaces hears of the old head, its payload's end, the old head, its own end."""
    with FaultProxy(("127.0.0.1", server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}?helpers=1")
        it.put(b"k", value(1, 100_000))
        start = proxy.reply_bytes
        it.put(b"k", value(2, 100_000))
        total = proxy.reply_bytes - start
        for turn, nbytes in enumerate(range(0, total, 7)):
            new = value(turn, 100_000)
            old = it.get(b"k", 100_000)[1]
            proxy.faults.cut_reply_after_bytes = proxy.reply_bytes + nbytes
            answers = []
            with contextlib.suppress(BackendUnavailable):
                answers.append(it.put(b"k", new, seconds=2))
            proxy.faults.cut_reply_after_bytes = -1
            assert answers in ([], [Status.TIMED_OUT])
            result, content = it.get(b"k", 100_000)
            assert result.status is Status.MISS or content in (old, new)
            assert it.put(b"k", new) is Status.OK and it.get(b"k", 100_000)[1] == new
    assert "Stacktrace" not in server.log()


def test_a_helper_killed_at_any_time_leaves_no_half_head(
    server: InfinistoreServer, opened: Open
) -> None:
    """Only another process would read it; nobody may be left to sweep it up."""
    reader = opened(server.url)
    for turn in range(12):
        writer = opened(f"{server.url}?helpers=1")
        stop = threading.Event()

        def write(turn=turn, writer=writer, stop=stop) -> None:  # type: ignore[no-untyped-def]
            while not stop.is_set():
                try:
                    writer.put(b"k", value(turn, 2000), seconds=1)
                except BackendUnavailable:
                    return

        helper = writer.store._pool._idle[0].pid
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.02 + turn * 0.0007)
        stop.set()
        os.kill(helper, signal.SIGKILL)
        thread.join()
        status = reader.get(b"k", 2000)[0].status
        assert status in (Status.OK, Status.MISS)
        writer.store.close()
    assert "Stacktrace" not in server.log()


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "another value", "head", "empty head"])
def test_a_value_changed_in_the_store_is_corrupt(
    shared_server: InfinistoreServer, opened: Open, damage: str
) -> None:
    it, raw = opened(shared_server.url), RawClient(shared_server.port)
    it.put(b"changed", value(1, 5000))
    it.put(b"neighbour", value(2, 5000))
    name = current_payload(raw, b"changed")
    content = bytearray(value(1, 5000))
    content[4000] ^= 1
    changes = {
        "flip": (name, bytes(content)),
        "cut": (name, value(1, 5000)[:4999]),
        "longer": (name, value(1, 5001)),
        "another value": (name, value(2, 5000)),
        "head": (head_name(b"changed"), raw.read(head_name(b"neighbour"))),
        "empty head": (head_name(b"changed"), b"x"),
    }
    raw.write(*changes[damage])
    assert it.get(b"changed", 9000)[0].status is Status.CORRUPT
    assert it.get(b"neighbour", 5000)[1] == value(2, 5000)
    assert it.store.delete([b"changed"], within(5)) == [Status.OK]
    it.put(b"changed", value(3, 5000))
    assert it.get(b"changed", 5000)[1] == value(3, 5000)


def test_a_frozen_server_is_late_and_nothing_else(server: InfinistoreServer, opened: Open) -> None:
    memory = Memory([MIB, MIB], region_id=1)
    assert memory.region is not None
    it = opened(server.url, regions=[memory.region])
    it.put(b"k", value(1, MIB))
    server.freeze()
    source, target = memory.buffers()
    answers: list[object] = []
    for call in (
        lambda: it.store.exists([b"k"], within(0.4)),
        lambda: it.store.get_into([b"k"], [target], within(0.4)),
        lambda: it.store.put_from([b"new"], [source], within(0.4)),
        lambda: it.store.delete([b"other"], within(0.4)),
    ):
        with Stopwatch() as watch:
            try:
                answers.append(call()[0])
            except BackendUnavailable:
                answers.append("unavailable")  # two helpers were killed in a row
        assert watch.seconds < 0.4 + GRACE_S
    late = {Status.TIMED_OUT, GetResult(Status.TIMED_OUT), "unavailable"}
    assert set(answers) <= late and answers[0] is Status.TIMED_OUT
    before = memory.array.tobytes()
    server.resume()
    time.sleep(1)
    assert memory.array.tobytes() == before, "nothing came late"
    until(lambda: it.get(b"k", MIB)[1] == value(1, MIB))
    result, content = it.get(b"new", MIB)
    assert result.status is Status.MISS or content == bytes([Memory.CANARY]) * MIB
    assert it.store.health(within(5)).ok


def test_a_short_value_does_not_wait_for_a_delayed_acknowledgement(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    """The library takes 44 ms for each read below 64 KiB, since the kernel delays one by 40."""
    it = opened(shared_server.url)
    it.put(b"short", b"x" * 100)
    seconds = []
    for _ in range(25):
        started_s = time.monotonic()
        it.get(b"short", 100)
        seconds.append(time.monotonic() - started_s)
    assert statistics.median(seconds) < 0.03
