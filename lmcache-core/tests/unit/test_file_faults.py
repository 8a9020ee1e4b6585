"""The file connector over a disk that fails at the n-th call, for every n."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.connectors.file import FileConnector
from lmcache_core.sdk import Buffer, ConfigError, OpContext, OsFileOps, Status

OLD, NEW = b"o" * 9000, b"n" * 9000
CALLS = ("open", "pread_into", "pwrite", "fsync", "fsync_dir", "fd_size", "rename", "unlink")
CALLS += ("makedirs", "exists", "scan")


class Failing:
    """Real file operations; the ``at``-th call raises ``number``."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.left = -1
        self.log: list[str] = []
        self._real = OsFileOps()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if name not in CALLS:
            return real

        def call(*args: Any) -> Any:
            self.log.append(name)
            self.left -= 1
            if self.left == -1:
                raise OSError(self.number, os.strerror(self.number))
            return real(*args)

        return call


def ctx() -> OpContext:
    return OpContext(deadline_s=time.monotonic() + 10)


def put(store: FileConnector, value: bytes) -> Status:
    return store.put_from([b"k"], [Buffer(memoryview(value), 4096, len(value))], ctx())[0]


def get(store: FileConnector) -> tuple[Status, bytes]:
    target = bytearray(16384)
    result = store.get_into([b"k"], [Buffer(memoryview(target), 4096, 16384)], ctx())[0]
    return result.status, bytes(target[: result.nbytes])


@pytest.mark.parametrize("durability", ["process", "host"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_after_a_fault_at_any_call_the_value_is_old_new_or_absent(
    tmp_path: Path, number: int, durability: str
) -> None:
    expected = Status.REJECTED if number == errno.ENOSPC else Status.FAILED
    for n in range(100):
        root = tmp_path / f"{n}"
        ops = Failing(number)
        store = FileConnector(str(root), durability=durability, ops=ops)
        assert put(store, OLD) is Status.OK
        ops.left = n
        answers = [put(store, NEW), get(store)[0], put(store, NEW)]
        faulted = ops.left < 0
        ops.left = -2
        assert set(answers) <= {Status.OK, expected}
        status, value = get(store)
        assert (status, value) in [(Status.OK, OLD), (Status.OK, NEW)]
        assert put(store, NEW) is Status.OK
        left = [p for p in root.rglob("*") if p.is_file()]
        assert [p.parent.name == "tmp" for p in left] == [False], "a temporary file was left"
        store.close()
        if not faulted:
            assert n > 5
            return
    raise AssertionError("the sequence never ran without a fault")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_an_error_at_reading_never_deletes(tmp_path: Path, number: int) -> None:
    ops = Failing(number)
    store = FileConnector(str(tmp_path), ops=ops)
    put(store, OLD)
    ops.left = 0
    assert get(store)[0] is Status.FAILED
    assert get(store) == (Status.OK, OLD)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_directory_that_cannot_be_used_is_an_error_at_open(tmp_path: Path, number: int) -> None:
    ops = Failing(number)
    ops.left = 0
    with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
        FileConnector(str(tmp_path), ops=ops)
    assert "write" in caught.value.hint


def test_a_file_in_the_place_of_the_directory_is_an_error_at_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("in the way")
    with pytest.raises(ConfigError, match="x can't be used"):
        FileConnector(str(tmp_path / "x"))


def test_a_relative_path_is_an_error_at_open() -> None:
    with pytest.raises(ConfigError, match="not absolute"):
        FileConnector("kv")


def test_files_and_directories_are_private(tmp_path: Path) -> None:
    store = FileConnector(str(tmp_path / "kv"))
    put(store, OLD)
    for path in (tmp_path / "kv" / "v1").rglob("*"):
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_durability_host_syncs_the_file_before_the_rename_and_the_directory_after(
    tmp_path: Path,
) -> None:
    ops = Failing(errno.EIO)
    store = FileConnector(str(tmp_path), durability="host", ops=ops)
    put(store, OLD)
    ops.log.clear()
    put(store, NEW)
    order = [call for call in ops.log if call in ("pwrite", "fsync", "rename", "fsync_dir")]
    assert order == ["pwrite", "fsync", "rename", "fsync_dir"]


def test_temporary_files_of_dead_processes_are_swept_those_of_living_ones_kept(
    tmp_path: Path,
) -> None:
    FileConnector(str(tmp_path))
    tmp = tmp_path / "v1" / "tmp"
    (tmp / "999999999-x-0").write_bytes(b"dead")
    (tmp / f"{os.getppid()}-x-0").write_bytes(b"alive")
    FileConnector(str(tmp_path))
    assert [p.name for p in tmp.iterdir()] == [f"{os.getppid()}-x-0"]
