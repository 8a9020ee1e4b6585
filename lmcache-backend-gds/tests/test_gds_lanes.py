"""Queue depth: parts of one call at the same time, and what the call answers then."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gds_support import KIB, file_of, get, put

from lmcache_backend_gds.connector import GdsConnector, capabilities
from lmcache_backend_gds.lanes import WORTH_BYTES, Lanes
from lmcache_conformance import Memory, value, within
from lmcache_conformance.rig import Host
from lmcache_core.sdk import (
    BackendUnavailable,
    Buffer,
    ContractViolation,
    GetResult,
    Status,
    ValueFiles,
)

Open = Callable[[str], GdsConnector]
SIZE = 256 * KIB


def buffers(count: int, nbytes: int) -> list[Buffer]:
    return [Buffer(None, index * nbytes, nbytes) for index in range(count)]


@pytest.mark.parametrize(
    ("depth", "count", "nbytes", "parts"),
    [(4, 8, SIZE, 4), (4, 9, SIZE, 4), (4, 3, 1 << 20, 3), (1, 8, SIZE, 1), (4, 1, 1 << 30, 1),
     (4, 8, WORTH_BYTES // 8 - 1, 1), (64, 128, SIZE, 64)],
)  # fmt: skip
def test_slices_cover_every_key_once(depth: int, count: int, nbytes: int, parts: int) -> None:
    found = Lanes(depth).slices(buffers(count, nbytes))
    assert len(found) == parts
    assert [i for part in found for i in range(count)[part]] == list(range(count))
    assert max(p.stop - p.start for p in found) - min(p.stop - p.start for p in found) <= 1


def test_parts_run_at_the_same_time_and_errors_stay_theirs() -> None:
    meeting = threading.Barrier(3)

    def part() -> int:
        return meeting.wait(5)

    def fails() -> int:
        raise OSError("no")

    lanes = Lanes(4)
    found = lanes.run([part, part, fails, part])
    assert sorted(each for each in found if isinstance(each, int)) == [0, 1, 2]
    assert isinstance(found[2], OSError)
    lanes.close()


@pytest.mark.parametrize("depth", [1, 2, 4, 64])
def test_answers_keep_the_order_of_the_keys(tmp_path: Path, opened: Open, depth: int) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix&queue_depth={depth}")
    keys = [b"k%d" % i for i in range(11)]
    source = Memory.of([value(i, SIZE + i) for i in range(11)])
    assert store.put_from(keys, source.buffers(read_only=True), within(10)) == [Status.OK] * 11
    store.delete([keys[4]], within(5))
    target = Memory([SIZE + 20 - 2 * i for i in range(11)])
    results = store.get_into(keys[::-1], target.buffers(), within(10))
    for index, (key, result) in enumerate(zip(range(10, -1, -1), results)):
        room, size = SIZE + 20 - 2 * index, SIZE + key
        if key == 4:
            assert result == GetResult(Status.MISS)
        elif room < size:
            assert result == GetResult(Status.SIZE_MISMATCH, size)
        else:
            assert result == GetResult(Status.OK, size)
            assert target.bytes_of(index, size) == value(key, size)
    assert target.canaries_intact()


def test_a_broken_call_touches_nothing_in_any_lane(tmp_path: Path, opened: Open) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix")
    put(store, b"k", value(1, SIZE))
    memory = Memory([SIZE] * 8)
    targets = memory.buffers()
    with pytest.raises(ContractViolation):
        store.get_into([b"k"] * 8, [*targets[:7], targets[0]], within(5))
    assert memory.untouched()


def test_each_lane_that_hangs_abandons_its_value_alone(
    tmp_path: Path, host: Host, opened: Open
) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix&queue_depth=4")
    keys = [b"k%d" % i for i in range(8)]
    for index, key in enumerate(keys):
        path = file_of(tmp_path / "kv", key)
        if index in (1, 6):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.mkfifo(path, 0o600)
        else:
            put(store, key, value(index, SIZE))
    memory, started_s = Memory([SIZE] * 8), time.monotonic()
    results = store.get_into(keys, memory.buffers(first_token=10), within(0.4))
    assert time.monotonic() - started_s < 0.65
    wanted = [Status.OK] * 8
    wanted[1] = wanted[6] = Status.ABANDONED
    wanted[7] = Status.TIMED_OUT
    assert [each.status for each in results] == wanted
    for index in (0, 2, 3, 4, 5):
        assert memory.bytes_of(index) == value(index, SIZE)
    for index in (1, 6):
        with open(file_of(tmp_path / "kv", keys[index]), "wb"):
            pass
    end_s = time.monotonic() + 5
    while len(host.released) < 2 and time.monotonic() < end_s:
        time.sleep(0.01)
    assert sorted(host.released) == [11, 16]


class HalfGone:
    """A mover whose store goes away for one value and stands still for another."""

    def __init__(self) -> None:
        self.lift = threading.Event()

    def read(self, path: str, target: Buffer) -> int:
        if path.endswith(b"gone".hex()):
            raise BackendUnavailable("gone", backend="gds")
        if path.endswith(b"still".hex()):
            self.lift.wait(10)
        return 0

    def write(self, path: str, source: Buffer) -> None:
        raise AssertionError(path)


def test_an_exception_never_hides_a_buffer_that_is_still_in_use(tmp_path: Path) -> None:
    released: list[int] = []
    mover = HalfGone()
    store = GdsConnector(
        ValueFiles(f"{tmp_path}/kv", backend="gds"),
        mover,
        io="posix",
        capabilities=capabilities(
            durability="process", direct=False, io="posix", device=False, gds=False
        ),
        queue_depth=2,
        released=released.append,
    )
    targets = Memory([1 << 20] * 2).buffers(first_token=5)
    with pytest.raises(BackendUnavailable):
        store.get_into([b"gone", b"fine"], targets, within(0.3))
    results = store.get_into([b"gone", b"still"], targets, within(0.3))
    assert [each.status for each in results] == [Status.FAILED, Status.ABANDONED]
    assert released == []
    mover.lift.set()
    end_s = time.monotonic() + 5
    while not released and time.monotonic() < end_s:
        time.sleep(0.01)
    assert released == [6]
    assert get(store, b"fine", 1)[0] == GetResult(Status.OK, 0)
    store.close()
