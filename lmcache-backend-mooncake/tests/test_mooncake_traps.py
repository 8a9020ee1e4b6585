"""What Mooncake does that a caller would not expect, and what we make of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from random import Random

import pytest
from mooncake_support import (
    Open,
    bare,
    connect,
    exists,
    get,
    helper_pid,
    put,
    settings,
    until,
)

from lmcache_backend_mooncake.connector import MooncakeConnector, name_of_key
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance import Memory, within
from lmcache_conformance.memory import value
from lmcache_conformance.throwaway import Stopwatch
from lmcache_core.config import EngineConfig, TierConfig
from lmcache_core.keys import Namespace
from lmcache_core.layout import ChunkLayout
from lmcache_core.opening import open_engine
from lmcache_core.sdk import BackendUnavailable, GetResult, Status

MIB = 1 << 20


def test_exists_is_no_promise_after_the_lender_died(server: MooncakeServer, opened: Open) -> None:
    store = opened(server.url).store
    assert put(store, b"k", value(1, MIB)) is Status.OK
    server.kill_lenders()
    assert exists(store, b"k") is Status.OK
    assert get(store, b"k", MIB)[0].status is Status.FAILED
    until(lambda: exists(store, b"k") is Status.MISS, 30, "the master does not notice")
    assert get(store, b"k", MIB)[0] == GetResult(Status.MISS)
    assert put(store, b"new", value(1, MIB)) is Status.REJECTED
    server.lend()
    assert put(store, b"new", value(2, MIB)) is Status.OK
    assert get(store, b"new", MIB)[1] == value(2, MIB)


def test_a_put_of_a_present_key_keeps_the_old_value(
    shared_server: MooncakeServer, opened: Open
) -> None:
    store = opened(shared_server.url).store
    assert put(store, b"kept", value(1, MIB)) is Status.OK
    assert put(store, b"kept", value(2, 2 * MIB)) is Status.OK
    assert get(store, b"kept", 2 * MIB)[1] == value(1, MIB)
    # How core repairs.
    assert store.delete([b"kept"], within(5)) == [Status.OK]
    assert put(store, b"kept", value(2, MIB)) is Status.OK
    assert get(store, b"kept", MIB)[1] == value(2, MIB)


def test_a_delete_within_the_lease_succeeds(shared_server: MooncakeServer, opened: Open) -> None:
    store = opened(shared_server.url).store
    assert put(store, b"leased", value(1, 4096)) is Status.OK
    assert get(store, b"leased", 4096)[0].status is Status.OK
    assert bare(shared_server, f"store.remove({name_of_key(b'leased')!r})") == -706
    assert store.delete([b"leased"], within(5)) == [Status.OK]
    assert get(store, b"leased", 4096)[0].status is Status.MISS


def test_a_killed_master_is_unavailable_at_once_and_back_by_itself(
    server: MooncakeServer, opened: Open
) -> None:
    store = opened(server.url).store
    assert put(store, b"k", value(1, MIB)) is Status.OK
    server.kill()
    for call in (
        lambda: exists(store, b"k"),
        lambda: get(store, b"k", MIB, seconds=1),
        lambda: put(store, b"new", value(1, MIB), seconds=1),
        lambda: store.delete([b"k"], within(1)),
    ):
        with Stopwatch() as watch, pytest.raises(BackendUnavailable, match="RPC_FAIL") as raised:
            call()
        assert raised.value.retryable and raised.value.hint
        assert watch.seconds < 1.25
    # The library's own health_check says 0 here.
    assert not store.health(within(1)).ok
    server.start()
    until(lambda: put(store, b"again", value(3, MIB)) is Status.OK, 30, "it does not come back")
    assert get(store, b"again", MIB)[1] == value(3, MIB)
    assert store.health(within(1)).ok


def test_a_killed_master_opens_the_breaker(server: MooncakeServer) -> None:
    """In a whole engine: the first failure is fatal, and what follows waits for nothing."""
    layout = ChunkLayout(chunk_size=16, payload_bytes=65536, description=b"t")
    tier = TierConfig(url=server.url, negative_ttl_s=0.0, probe_interval_s=0.2)
    config = EngineConfig(host_bytes=4 * MIB, chunk_size=16, tiers=(tier,))
    engine = open_engine(config, layout=layout, namespace=Namespace.of({"model": "tiny"}))
    try:
        remote = engine.tiers.readable[0]
        assert engine.lookup(range(32)).tokens == 0 and remote.available
        server.kill()
        with Stopwatch() as watch:
            assert engine.lookup(range(32)).tokens == 0
        assert watch.seconds < 2.5
        assert not remote.available and "RPC_FAIL" in remote.unavailable_reason
        with Stopwatch() as watch:
            assert engine.lookup(range(32)).tokens == 0
        assert watch.seconds < 0.1
        server.start()

        def well() -> bool:
            engine.poll()
            return remote.available

        until(well, 30, "the breaker stays open")
    finally:
        engine.close()


def test_a_transfer_that_outlasts_the_deadline_is_abandoned(
    server: MooncakeServer, opened: Open
) -> None:
    memory = Memory([MIB, MIB], region_id=1)
    each = opened(server.url, regions=(memory,))
    assert put(each.store, b"k", value(1, MIB)) is Status.OK
    server.freeze_lenders()
    targets = memory.buffers(first_token=7)
    outside = Memory([MIB])
    with Stopwatch() as watch:
        results = each.store.get_into([b"k", b"k"], targets, within(0.4))
        late = each.store.get_into([b"k"], outside.buffers(), within(0.4))
    assert watch.seconds < 0.8 + 0.5
    assert [each.status for each in results] == [Status.ABANDONED] * 2
    assert late == [GetResult(Status.TIMED_OUT)] and not each.host.released
    server.resume()
    until(lambda: sorted(each.host.released) == [7, 8], 30, "the memory was never given back")
    assert outside.untouched()
    assert each.counters["mooncake.abandoned"].value == 2
    assert get(each.store, b"k", MIB)[1] == value(1, MIB)


def test_close_returns_though_the_library_takes_longer(server: MooncakeServer) -> None:
    for harm in (server.kill, server.freeze):
        each = connect(server.url, segment_bytes=64 * MIB)
        pid = helper_pid(each)
        assert put(each.store, b"k", value(1, MIB)) in (Status.OK, Status.REJECTED)
        harm()
        with Stopwatch() as watch:
            each.store.close()
        assert watch.seconds < 5.0
        assert not os.path.exists(f"/proc/{pid}")
        server.resume()
        if harm == server.kill:
            server.start()
            time.sleep(2)


def test_a_put_that_never_ended_is_no_ok(shared_server: MooncakeServer, opened: Open) -> None:
    """``batch_put_from`` answers 0 there for half a minute, and nothing can be read."""
    each = opened(shared_server.url)
    name = name_of_key(b"limbo")
    bare(shared_server, f"store.batch_put_session_start([{name!r}], [4096])")
    again = f"store.put({name!r}, b'x'), store.is_exist({name!r})"
    assert bare(shared_server, again) == [0, 0]
    assert put(each.store, b"limbo", value(1, 4096)) is Status.FAILED
    assert get(each.store, b"limbo", 4096)[0].status is Status.MISS
    assert each.store.delete([b"limbo"], within(5)) == [Status.FAILED]
    assert each.counters["mooncake.puts_of_unended_keys"].value == 1


def test_a_failed_transfer_publishes_nothing(server: MooncakeServer, opened: Open) -> None:
    """The library's session would: its end answers 0 after a transfer that failed."""
    store = opened(server.url).store
    server.kill_lenders()
    assert put(store, b"k", value(1, MIB)) is Status.FAILED
    assert exists(store, b"k") is Status.MISS
    assert get(store, b"k", MIB)[0].status is Status.MISS


def test_a_read_beside_deletes_is_whole_or_none(server: MooncakeServer, opened: Open) -> None:
    """A delete by force frees memory that is being read, and the next put takes it."""
    reader, writer = opened(server.url).store, opened(server.url).store
    size = 16 * MIB
    contents = {b"k%d" % i: value(i, size) for i in range(3)}
    seen = {Status.OK: 0, Status.MISS: 0, Status.FAILED: 0}
    done = threading.Event()

    def churn() -> None:
        random = Random(1)
        while not done.is_set():
            for key, content in contents.items():
                put(writer, key, content)
                time.sleep(random.uniform(0, 0.1))
                writer.delete([key], within(5))

    thread = threading.Thread(target=churn)
    thread.start()
    soon_s, end_s = time.monotonic() + 4, time.monotonic() + 30
    try:
        while time.monotonic() < soon_s or (
            time.monotonic() < end_s and not (seen[Status.OK] and seen[Status.MISS])
        ):
            for key, content in contents.items():
                result, found = get(reader, key, size)
                seen[result.status] += 1
                assert result.status is not Status.OK or found == content
    finally:
        done.set()
        thread.join()
    assert seen[Status.OK] and seen[Status.MISS]


def test_opening_beside_a_frozen_master_does_not_stop_this_process(server: MooncakeServer) -> None:
    """The library's setup holds the interpreter's lock until the master answers."""
    server.freeze()
    failed: list[Exception] = []

    def open_it() -> None:
        from lmcache_conformance.rig import Host

        host = Host(server.directory).services
        try:
            MooncakeConnector(settings(server.url), host, time.monotonic() + 3).close()
        except BackendUnavailable as error:
            failed.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()
    longest_s, last_s = 0.0, time.monotonic()
    while thread.is_alive():
        time.sleep(0.005)
        longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
    assert failed and longest_s < 0.5


def test_a_library_that_dies_takes_nothing_with_it(
    shared_server: MooncakeServer, opened: Open
) -> None:
    memory = Memory([MIB, MIB], region_id=1)
    each = opened(shared_server.url, regions=(memory,))
    source, target = memory.buffers()
    memory.fill(0, value(5, MIB))
    assert each.store.put_from([b"dies"], [source], within(5)) == [Status.OK]
    os.kill(helper_pid(each), signal.SIGSEGV)
    try:
        assert exists(each.store, b"dies") is Status.OK
    except BackendUnavailable:
        assert exists(each.store, b"dies") is Status.OK
    assert each.store.get_into([b"dies"], [target], within(5)) == [GetResult(Status.OK, MIB)]
    assert memory.bytes_of(1) == value(5, MIB)
    assert 1 in each.store._supervisor.mapped
    assert each.counters["mooncake.helper_starts"].value == 2


def test_a_call_that_hangs_ends_with_its_process(server: MooncakeServer, opened: Open) -> None:
    memory = Memory([MIB], region_id=1)
    each = opened(server.url, regions=(memory,), stuck_after_s=1.0, max_late_calls=1)
    assert put(each.store, b"k", value(1, MIB)) is Status.OK
    server.freeze_lenders()
    pid = helper_pid(each)
    first = each.store.get_into([b"k"], memory.buffers(first_token=3), within(0.2))
    assert first[0].status is Status.ABANDONED
    with pytest.raises(BackendUnavailable, match="1 calls hang"):
        get(each.store, b"k", MIB, seconds=1)
    until(lambda: each.host.released == [3], 30, "the memory was never given back")
    assert not os.path.exists(f"/proc/{pid}")
    server.resume()
    assert get(each.store, b"k", MIB, seconds=5)[1] == value(1, MIB)
