"""Regions, replicas, pins, lent memory and the SSD, on real stores."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from mooncake_support import Open, bare, exists, get, helper_pid, put, until

from lmcache_backend_mooncake.connector import name_of_key
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance import Memory, within
from lmcache_conformance.memory import value
from lmcache_core.sdk import BackendUnavailable, Durability, GetResult, Region, Status

MIB = 1 << 20


def resident_kib(pid: int | str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def test_a_region_known_at_open_moves_without_a_copy(
    shared_server: MooncakeServer, opened: Open
) -> None:
    """Neither this process nor the helper takes a tenth of the value in addition."""
    size = 64 * MIB
    memory = Memory([size, size], region_id=4)
    memory.fill(0, value(1, size))
    memory.fill(1, b"\1" * size)
    each = opened(shared_server.url, regions=(memory,))
    source, target = memory.buffers()
    helper = helper_pid(each)
    # The region's pages count in the helper too, as shared; what it holds alone must not grow.
    before = {pid: resident_kib(pid, "RssAnon") for pid in ("self", helper)}
    Path("/proc/self/clear_refs").write_text("5")
    rss = resident_kib("self", "VmRSS")
    assert each.store.put_from([b"big"], [source], within(20)) == [Status.OK]
    assert each.store.get_into([b"big"], [target], within(20)) == [GetResult(Status.OK, size)]
    assert resident_kib("self", "VmHWM") - rss < size // 1024 // 10
    for pid, kib in before.items():
        assert resident_kib(pid, "RssAnon") - kib < size // 1024 // 10
    assert memory.bytes_of(1) == value(1, size)
    assert each.store.delete([b"big"], within(5)) == [Status.OK]


def test_regions_come_and_go(shared_server: MooncakeServer, opened: Open) -> None:
    each = opened(shared_server.url)
    mapped = each.store._supervisor.mapped
    memory = Memory([MIB], region_id=9)
    assert memory.region is not None
    each.store.register_region(memory.region)
    assert mapped == {9: memory.region}
    assert maps_of(helper_pid(each)) == 1
    each.store.unregister_region(memory.region)
    assert not mapped and maps_of(helper_pid(each)) == 0
    each.store.register_region(Region(10, memory.address, MIB, memory.region.memory, fd=-1))
    assert not mapped, "what has no memfd is copied"
    each.store.register_region(Region(11, memory.address, 1 << 50, memory.region.memory, memory.fd))
    assert not mapped and each.counters["mooncake.regions_failed"].value == 1
    buffers = memory.buffers()
    memory.fill(0, value(3, MIB))
    assert each.store.put_from([b"r"], buffers, within(5)) == [Status.OK]
    assert get(each.store, b"r", MIB)[1] == value(3, MIB)
    each.store.delete([b"r"], within(5))


def maps_of(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:conformance")


def test_one_call_mixes_what_is_mapped_and_what_is_not(
    shared_server: MooncakeServer, opened: Open
) -> None:
    inside, outside = Memory([MIB], region_id=2), Memory([MIB])
    each = opened(shared_server.url, regions=(inside,))
    inside.fill(0, value(1, MIB))
    outside.fill(0, value(2, MIB))
    buffers = [inside.buffers()[0], outside.buffers()[0]]
    assert each.store.put_from([b"in", b"out"], buffers, within(5)) == [Status.OK] * 2
    found = each.store.get_into([b"out", b"in"], buffers, within(5))
    assert found == [GetResult(Status.OK, MIB)] * 2
    assert inside.bytes_of(0) == value(2, MIB) and outside.bytes_of(0) == value(1, MIB)
    each.store.delete([b"in", b"out"], within(5))


def test_a_helper_that_is_killed_costs_the_calls_in_flight_only(
    server: MooncakeServer, opened: Open
) -> None:
    each = opened(server.url)
    assert put(each.store, b"k", value(1, MIB)) is Status.OK
    server.freeze_lenders()
    timer = _later(0.3, lambda: os.kill(helper_pid(each), signal.SIGKILL))
    with pytest.raises(BackendUnavailable, match="helper process ended"):
        get(each.store, b"k", MIB, seconds=5)
    timer.join()
    server.resume()
    assert get(each.store, b"k", MIB, seconds=5)[1] == value(1, MIB)
    assert each.counters["mooncake.helper_deaths"].value == 1


def test_a_second_lender_keeps_replicas(opened: Open) -> None:
    with MooncakeServer(lenders=2, segment_bytes=64 * MIB) as server:
        store = opened(server.url, replicas=2).store
        assert put(store, b"k", value(1, MIB)) is Status.OK
        server.lenders[0].kill()
        server.lenders[0].wait()
        # Until the master has noticed a get may still ask the dead one.
        until(lambda: get(store, b"k", MIB)[0].status is Status.OK, 30, "no replica is left")
        assert get(store, b"k", MIB)[1] == value(1, MIB)


@pytest.mark.parametrize("pin, stays", [("hard", Status.OK), ("soft", Status.OK)])
def test_pinned_values_stay_while_others_are_evicted(opened: Open, pin: str, stays: Status) -> None:
    with MooncakeServer(segment_bytes=64 * MIB) as server:
        pinning, plain = opened(server.url, pin=pin).store, opened(server.url).store
        assert put(pinning, b"pinned", value(1, MIB)) is Status.OK
        for number in range(150):
            put(plain, b"f%d" % number, value(number, MIB))
            time.sleep(0.01)
        # Asked last: an exists is a lease.
        there = plain.exists([b"f%d" % i for i in range(60)], within(5))
        assert Status.MISS in there, "nothing was evicted"
        assert exists(pinning, b"pinned") is stays
        assert get(pinning, b"pinned", MIB)[1] == value(1, MIB)
        assert plain.delete([b"pinned"], within(5)) == [Status.OK]


def test_memory_of_our_own_is_lent_and_taken_back(opened: Open) -> None:
    with MooncakeServer(lenders=0) as server:
        lender, other = opened(server.url, segment_bytes=64 * MIB), opened(server.url)
        assert lender.store.capabilities.durability is Durability.NONE
        assert other.store.capabilities.durability is Durability.PROCESS
        assert put(other.store, b"k", value(1, MIB)) is Status.OK
        assert get(lender.store, b"k", MIB)[1] == value(1, MIB)
        lender.store.close()
        # Given back at once, with the values; nobody waits for a time-out of the master's.
        assert exists(other.store, b"k") is Status.MISS
        assert put(other.store, b"k", value(1, MIB)) is Status.REJECTED


@pytest.mark.slow
def test_lent_memory_overflows_to_the_ssd(tmp_path: Path, opened: Open) -> None:
    soon = {
        "MOONCAKE_OFFLOAD_BUCKET_SIZE_LIMIT_BYTES": str(4 * MIB),
        "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
    }
    path = str(tmp_path / "ssd")
    # What is leased stays in memory.
    short = ("-default_kv_lease_ttl=500",)
    with MooncakeServer(
        segment_bytes=128 * MIB, ssd_path=path, environment=soon, arguments=short
    ) as server:
        store = opened(server.url).store
        keys: list[bytes] = []
        on_disk: list[int] = []
        while not on_disk:
            assert len(keys) < 2000, "nothing is on the SSD alone"
            for number in range(len(keys), len(keys) + 100):
                keys.append(b"f%d" % number)
                put(store, keys[-1], value(number, MIB))
                time.sleep(0.02)
            on_disk = alone_on_disk(server, keys)
        for number in on_disk[:8]:
            result, content = get(store, keys[number], MIB)
            assert result == GetResult(Status.OK, MIB) and content == value(number, MIB)


def alone_on_disk(server: MooncakeServer, keys: list[bytes]) -> list[int]:
    """Which of them have no copy in memory, as the master says."""
    names = [name_of_key(key) for key in keys]
    where = f"[[d.is_memory_replica() for d in store.get_replica_desc(n)] for n in {names}]"
    return [i for i, replicas in enumerate(bare(server, where)) if replicas == [False]]


def _later(seconds: float, call):  # type: ignore[no-untyped-def]
    import threading

    timer = threading.Timer(seconds, call)
    timer.start()
    return timer
