"""System calls: the files of ``file://``, O_DIRECT, a full disk, a disk that stands still."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gds_support import MIB, file_of, get, put, values_below

from lmcache_backend_gds.connector import GdsConnector
from lmcache_backend_gds.direct import DirectOps
from lmcache_conformance import Memory, value, within
from lmcache_conformance.rig import Host
from lmcache_core.connectors.file import FileConnector
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    Buffer,
    ConfigError,
    Durability,
    GetResult,
    MemoryKind,
    Status,
)

Open = Callable[[str], GdsConnector]
SIZES = (1, 4095, 4096, 4097, 3 * MIB + 5)


@pytest.mark.parametrize("query", ["?io=posix", "?io=posix&durability=host"])
def test_file_and_gds_read_each_others_values(tmp_path: Path, opened: Open, query: str) -> None:
    ours, theirs = opened(f"gds://{tmp_path}/kv{query}"), FileConnector(f"{tmp_path}/kv")
    for size in SIZES:
        assert put(ours, b"ours%d" % size, value(size, size)) is Status.OK
        assert put(theirs, b"theirs%d" % size, value(size + 1, size)) is Status.OK
    for size in SIZES:
        for store in (ours, theirs):
            assert get(store, b"ours%d" % size, size)[1] == value(size, size)
            assert get(store, b"theirs%d" % size, size)[1] == value(size + 1, size)
    assert {each.key for each in ours.scan(b"", within(5))} == {
        name % size for name in (b"ours%d", b"theirs%d") for size in SIZES
    }
    assert file_of(tmp_path / "kv", b"ours1").stat().st_mode & 0o777 == 0o600
    theirs.close()


def test_direct_writes_whole_pages_and_reads_what_file_wrote(tmp_path: Path, opened: Open) -> None:
    ours, theirs = opened(f"gds://{tmp_path}/kv?io=posix&direct=1"), FileConnector(f"{tmp_path}/kv")
    assert ours.capabilities.alignment == 4096
    assert put(ours, b"pages", value(1, 3 * MIB)) is Status.OK
    assert get(theirs, b"pages", 3 * MIB)[1] == value(1, 3 * MIB)
    for size in SIZES:
        put(theirs, b"odd", value(size, size))
        pages = -(-size // 4096) * 4096
        result, found = get(ours, b"odd", pages)
        assert (result, found) == (GetResult(Status.OK, size), value(size, size))
    memory = Memory([4096], offset=512)
    assert ours.put_from([b"k"], memory.buffers(), within(5)) == [Status.REJECTED]
    assert put(ours, b"k", b"x" * 4097) is Status.REJECTED
    theirs.close()


def test_direct_goes_around_the_page_cache_until_a_tail_needs_it(tmp_path: Path) -> None:
    ops, memory = DirectOps(), Memory([4 * 4096])
    view = memory.buffers()[0].view
    assert view is not None
    fd = ops.open(f"{tmp_path}/f", os.O_CREAT | os.O_RDWR)

    def direct() -> bool:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    assert ops.pwrite(fd, view[: 2 * 4096], 0) == 2 * 4096 and direct()
    assert ops.pwrite(fd, view[: 4096 + 10], 2 * 4096) == 4096 and direct()
    assert ops.pread_into(fd, view[: 4096 + 10], 0) == 4096 and direct()
    assert ops.pread_into(fd, view[4096 : 4096 + 10], 4096) == 10 and not direct()
    assert ops.pwrite(fd, view[:7], 3 * 4096 + 1) == 7 and not direct()
    ops.close(fd)


def test_a_file_system_without_o_direct_is_told_at_open(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ConfigError, match="use direct=0"):
        opened(f"gds://{tmp_path}/kv?io=posix&direct=1")
    opened(f"gds://{tmp_path}/kv?io=posix")


@pytest.mark.parametrize("query", ["io=posix", "io=posix&direct=1"])
def test_a_full_disk_rejects_and_keeps_what_is_there(small: Path, opened: Open, query: str) -> None:
    try:
        store = opened(f"gds://{small}/kv?{query}")
    except ConfigError as error:
        pytest.skip(f"tmpfs of this kernel: {error.message}")
    assert put(store, b"k", value(1, 3 * MIB)) is Status.OK
    assert put(store, b"k", value(2, 6 * MIB)) is Status.REJECTED
    assert put(store, b"large", value(2, 6 * MIB)) is Status.REJECTED
    assert get(store, b"k", 3 * MIB)[1] == value(1, 3 * MIB)
    assert values_below(small) == [file_of(small / "kv", b"k")]
    assert store.delete([b"k"], within(5)) == [Status.OK]
    assert put(store, b"large", value(2, 6 * MIB)) is Status.OK


def test_a_target_too_small_learns_the_size(tmp_path: Path, opened: Open) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix")
    put(store, b"k", value(1, 5000))
    assert get(store, b"k", 4999)[0] == GetResult(Status.SIZE_MISMATCH, 5000)


def test_device_memory_is_rejected_without_a_device(tmp_path: Path, opened: Open) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix")
    put(store, b"k", b"x" * 4096)
    foreign = Buffer(None, 1 << 40, 4096, MemoryKind.DEVICE)
    assert store.put_from([b"new"], [foreign], within(5)) == [Status.REJECTED]
    assert store.get_into([b"k"], [foreign], within(5))[0].status is Status.REJECTED


def test_claims_follow_the_options(tmp_path: Path, opened: Open) -> None:
    plain = opened(f"gds://{tmp_path}/kv?io=posix").capabilities
    assert (plain.alignment, plain.durability) == (1, Durability.PROCESS)
    assert plain.zero_copy and not plain.regions and plain.memory == {MemoryKind.HOST}
    synced = opened(f"gds://{tmp_path}/kv?io=posix&durability=host").capabilities
    assert synced.durability is Durability.HOST


def test_a_call_that_hangs_is_abandoned_released_and_counted(
    tmp_path: Path, host: Host, opened: Open
) -> None:
    """A value that is a FIFO: opening it hangs until somebody writes to it."""
    store = opened(f"gds://{tmp_path}/kv?io=posix&max_stuck=1")
    put(store, b"there", b"x" * 100)
    hanging = file_of(tmp_path / "kv", b"fifo")
    hanging.parent.mkdir(mode=0o700, exist_ok=True)
    os.mkfifo(hanging, 0o600)
    memory, started_s = Memory([100, 100]), time.monotonic()
    results = store.get_into([b"fifo", b"there"], memory.buffers(first_token=7), within(0.3))
    assert [each.status for each in results] == [Status.ABANDONED, Status.TIMED_OUT]
    assert time.monotonic() - started_s < 0.55
    assert store.stuck_calls == 1 and host.released == []
    with pytest.raises(BackendUnavailable) as caught:
        get(store, b"there", 100)
    assert caught.value.retryable and caught.value.hint
    with open(hanging, "wb"):
        end_s = time.monotonic() + 5
        while not host.released and time.monotonic() < end_s:
            time.sleep(0.01)
    assert host.released == [7] and store.stuck_calls == 0
    assert get(store, b"there", 100)[1] == b"x" * 100


def test_close_does_not_wait_for_a_call_that_hangs(tmp_path: Path, opened: Open) -> None:
    store = opened(f"gds://{tmp_path}/kv?io=posix")
    hanging = file_of(tmp_path / "kv", b"fifo")
    hanging.parent.mkdir(mode=0o700)
    os.mkfifo(hanging, 0o600)
    seen: list[Status] = []
    reader = threading.Thread(target=lambda: seen.append(get(store, b"fifo", 9, 0.5)[0].status))
    reader.start()
    time.sleep(0.1)
    started_s = time.monotonic()
    store.close()
    assert time.monotonic() - started_s < 0.3
    reader.join(2)
    assert seen == [Status.ABANDONED]
    with pytest.raises(BackendClosed):
        store.exists([b"k"], within(1))
    with open(hanging, "wb"):
        pass
