"""Helpers: what they map, when they are killed, restarted and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from infinistore_support import MIB, Open, alive, helpers_of, until

from lmcache_backend_infinistore.conformance import RawClient
from lmcache_backend_infinistore.layout import Head, head_name, payload_name
from lmcache_backend_infinistore.server import InfinistoreServer
from lmcache_backend_infinistore.supervisor import Helper
from lmcache_conformance import FaultProxy, Memory, value, within
from lmcache_conformance.throwaway import Stopwatch
from lmcache_core.sdk import BackendClosed, BackendUnavailable, GetResult, Status


def test_a_region_is_read_and_written_without_a_bounce(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    memory = Memory([MIB, MIB], region_id=1)
    assert memory.region is not None
    it = opened(shared_server.url, regions=[memory.region])
    memory.fill(0, value(1, MIB))
    source, target = memory.buffers()
    assert it.store.put_from([b"region"], [source], within(5)) == [Status.OK]
    assert it.store.get_into([b"region"], [target], within(5)) == [GetResult(Status.OK, MIB)]
    assert memory.bytes_of(1) == value(1, MIB) and memory.canaries_intact()
    (helper,) = it.store._pool._idle
    assert not any(helper.bounce[: 4 * MIB])
    assert it.get(b"region", MIB)[1] == value(1, MIB)
    assert any(helper.bounce[:MIB])


def test_a_helper_forgets_a_region(shared_server: InfinistoreServer, opened: Open) -> None:
    memory = Memory([MIB], region_id=7)
    assert memory.region is not None
    it = opened(f"{shared_server.url}?helpers=1")
    it.store.register_region(memory.region)
    it.store.put_from([b"region"], memory.buffers(), within(5))
    (helper,) = helpers_of(os.getpid())
    assert "memfd:conformance" in Path(f"/proc/{helper}/maps").read_text()
    it.store.unregister_region(memory.region)
    assert it.get(b"region", MIB)[0].status is Status.OK
    assert "memfd:conformance" not in Path(f"/proc/{helper}/maps").read_text()


def test_a_batch_that_is_larger_than_the_bounce(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    it = opened(f"{shared_server.url}?bounce_bytes={2 * MIB}")
    contents = [value(i, 900_000 + i) for i in range(7)]
    keys = [b"batch%d" % i for i in range(7)]
    sources, targets = Memory.of(contents), Memory([3 * MIB] * 7)
    answers = it.store.put_from(keys, sources.buffers(read_only=True), within(10))
    assert answers == [Status.OK] * 7
    results = it.store.get_into(keys, targets.buffers(), within(10))
    assert results == [GetResult(Status.OK, len(each)) for each in contents]
    assert [targets.bytes_of(i, len(each)) for i, each in enumerate(contents)] == contents
    assert it.put(b"over", bytes(2 * MIB + 1)) is Status.REJECTED


def test_a_late_helper_is_killed_and_its_target_is_left_alone(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    memory = Memory([8 * MIB], region_id=1)
    assert memory.region is not None
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}?helpers=1", regions=[memory.region])
        it.put(b"slow", value(1, 8 * MIB))
        (helper,) = helpers_of(os.getpid())
        proxy.faults.bytes_per_s = 5e6
        results = it.store.get_into([b"slow"], memory.buffers(), within(0.6))
        assert results == [GetResult(Status.TIMED_OUT)]
        assert not alive(helper)
        before = memory.array.tobytes()
        proxy.faults.bytes_per_s = 0
        time.sleep(0.5)
        assert memory.array.tobytes() == before
        assert not it.host.released
        assert it.get(b"slow", 8 * MIB)[1] == value(1, 8 * MIB)
        assert it.counts["helper_kills"] == 1 and it.counts["helper_starts"] == 2


def test_what_was_done_before_the_deadline_counts(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    sizes = [1000, 8 * MIB, 1000]
    keys = [b"first", b"large", b"last"]
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}")
        for key, size in zip(keys, sizes):
            it.put(key, value(size, size))
        proxy.faults.bytes_per_s = 4e6
        memory = Memory(sizes)
        results = it.store.get_into(keys, memory.buffers(), within(1.0))
        late = GetResult(Status.TIMED_OUT)
        assert results == [GetResult(Status.OK, 1000), late, late]
        assert memory.bytes_of(0) == value(1000, 1000)


def test_a_helper_that_can_not_be_killed_at_once_keeps_its_buffers(
    server: InfinistoreServer, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a system call that can't be interrupted: ABANDONED until it is gone."""
    memory = Memory([MIB], region_id=1)
    assert memory.region is not None
    it = opened(server.url, regions=[memory.region])
    it.put(b"k", value(1, MIB))
    monkeypatch.setattr(Helper, "kill", lambda self: False)
    server.freeze()
    (buffer,) = memory.buffers(first_token=42)
    results = it.store.get_into([b"k"], [buffer], within(0.3))
    assert results == [GetResult(Status.ABANDONED)]
    until(lambda: it.host.released == [42])
    outside = it.get(b"k", MIB, seconds=0.3)[0]
    assert outside.status is Status.TIMED_OUT, "what it may still touch is its own"
    server.resume()


def test_a_dead_server_does_not_start_helpers_without_end(
    server: InfinistoreServer, opened: Open
) -> None:
    it = opened(server.url)
    it.put(b"k", b"value")
    server.kill()
    starts = it.counts["helper_starts"]
    seconds = []
    for _ in range(60):
        with Stopwatch() as watch, pytest.raises(BackendUnavailable):
            it.get(b"k", 10, seconds=30)
        seconds.append(watch.seconds)
        time.sleep(0.01)
    assert it.counts["helper_starts"] - starts <= 2
    # A call that waits for such a start takes as long as it does; no other waits.
    assert sum(sorted(seconds)[:-2]) < 4 and sorted(seconds)[-3] < 1


def test_a_helper_that_dies_idle_is_replaced_unseen(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    it = opened(f"{shared_server.url}?helpers=1")
    it.put(b"k", b"value")
    for _ in range(3):
        (helper,) = helpers_of(os.getpid())
        os.kill(helper, signal.SIGKILL)
        until(lambda helper=helper: not alive(helper))
        assert it.get(b"k", 10)[1] == b"value"


def test_a_connection_that_was_cut_while_idle_is_made_anew(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    with FaultProxy(("127.0.0.1", shared_server.port)) as proxy:
        it = opened(f"infinistore://127.0.0.1:{proxy.port}?helpers=1")
        it.put(b"k", b"value")
        for _ in range(3):
            proxy.hang_up()
            time.sleep(0.1)
            assert it.get(b"k", 10)[1] == b"value"
        assert it.counts["helper_starts"] == 1


def test_what_was_replaced_goes_after_the_grace(
    shared_server: InfinistoreServer, opened: Open
) -> None:
    it, raw = opened(f"{shared_server.url}?longest_deadline_s=0.5"), RawClient(shared_server.port)

    def payload() -> str:
        head = Head.decode(b"grace", raw.read(head_name(b"grace")))
        assert head is not None
        return payload_name(b"grace", head.version)

    it.put(b"grace", value(1, 5000))
    first = payload()
    it.put(b"grace", value(2, 5000))
    second = payload()
    it.store.delete([b"grace"], within(5))
    time.sleep(0.6)
    assert it.store.health(within(5)).ok
    assert it.store.health(within(5)).ok
    assert not (raw.exists(first) or raw.exists(second) or raw.exists(head_name(b"grace")))


def test_no_room_is_rejected(tmp_path: Path, opened: Open) -> None:
    """Four blocks of 256 MiB; three stay taken when the server has evicted."""
    with InfinistoreServer(block_kib=256 << 10) as server:
        it = opened(f"{server.url}?bounce_bytes={300 * MIB}")
        for number in range(2):
            assert it.put(b"%d" % number, value(number, 1000)) is Status.OK
        assert it.put(b"large", bytes(260 * MIB), seconds=60) is Status.REJECTED
        assert it.get(b"large", 10)[0].status is Status.MISS
        assert it.put(b"small", value(3, 1000)) is Status.OK
        assert it.get(b"small", 1000)[1] == value(3, 1000)


def test_close_ends_every_helper(shared_server: InfinistoreServer, opened: Open) -> None:
    it = opened(shared_server.url)
    threads = [threading.Thread(target=it.put, args=(b"k%d" % i, value(i, MIB))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Stopwatch() as watch:
        it.store.close()
    assert watch.seconds < 2
    until(lambda: not helpers_of(os.getpid()))
    with pytest.raises(BackendClosed):
        it.get(b"k0", 10)


def test_helpers_and_server_end_with_the_process_that_started_them() -> None:
    program = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from infinistore_support import Opened, helpers_of
from lmcache_backend_infinistore.server import InfinistoreServer
server = InfinistoreServer()
it = Opened(server.url, Path("/tmp"))
it.put(b"k", b"value")
print(server.pid, *helpers_of(os.getpid()), server.directory, flush=True)
server.freeze()
time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        *pids, folder = process.stdout.readline().split()
        assert len(pids) == 2 and all(alive(int(pid)) for pid in pids)
    finally:
        process.kill()
        process.communicate()
    until(lambda: not any(alive(int(pid)) for pid in pids))
    for left in Path(folder).glob("*"):
        left.unlink()
    Path(folder).rmdir()


def test_the_server_is_seen_on_loopback_only(shared_server: InfinistoreServer) -> None:
    def listening() -> list[str]:
        rows = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        return [row.split()[1] for row in rows if row.split()[3] == "0A"]

    ours = [each for each in listening() if int(each[-4:], 16) == shared_server.port]
    assert [each[:8] for each in ours] == ["0100007F"]
    from lmcache_backend_infinistore.warden import MANAGE_PORT, SERVICE_PORT

    ports = {int(each[-4:], 16) for each in listening()}
    assert not ports & {SERVICE_PORT, MANAGE_PORT}


def test_the_command_line_runs_a_command_with_a_server() -> None:
    module = "lmcache_backend_infinistore.server"
    program = "import sys; from lmcache_core.plugins import probe; print(probe(sys.argv[1]).usable)"
    command = [sys.executable, "-m", module, sys.executable, "-c", program, "{url}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["True"]), done.stderr
