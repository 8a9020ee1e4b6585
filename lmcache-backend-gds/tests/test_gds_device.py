"""What is handed to kvikio for device memory.  No device here: a fake CuFile looks at it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_backend_gds import driver, opening
from lmcache_backend_gds.connector import GdsConnector
from lmcache_backend_gds.plugin import OPTIONS
from lmcache_conformance import within
from lmcache_conformance.rig import Count, Host
from lmcache_core.sdk import Buffer, GetResult, MemoryKind, Region, Status

DEVICE = 1 << 40


class FakeFuture:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def get(self) -> int:
        return self.nbytes


class FakeKvikio:
    """As much of kvikio as the backend uses; ``memory`` is the device's, by address."""

    def __init__(self) -> None:
        self.memory: dict[int, bytes] = {}
        self.registered: dict[int, int] = {}
        self.settings: dict[str, Any] = {"num_threads": 1}
        self.tasks: set[int] = set()
        self.lost_bytes = 0
        self.defaults = self.cufile_driver = self

    def is_compat_mode_preferred(self) -> bool:
        return False

    def get(self, name: str) -> Any:
        return {"is_gds_available": True, **self.settings}[name]

    def set(self, *config: Any) -> None:
        self.settings.update([config] if len(config) == 2 else config[0])

    def memory_register(self, array: Any) -> None:
        described = array.__cuda_array_interface__
        if described["data"][0] == DEVICE + (1 << 30):
            raise RuntimeError("cuFile error: the page table is full")
        self.registered[described["data"][0]] = described["shape"][0]

    def memory_deregister(self, array: Any) -> None:
        del self.registered[array.__cuda_array_interface__["data"][0]]

    def CuFile(self, path: str, flags: str) -> FakeFile:
        return FakeFile(self, path, flags)


class FakeFile:
    def __init__(self, kvikio: FakeKvikio, path: str, flags: str) -> None:
        self.kvikio = kvikio
        self.fd = os.open(path, {"r": os.O_RDONLY, "r+": os.O_RDWR}[flags])

    def __enter__(self) -> FakeFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)

    def pread(self, array: Any, size: int, task_size: int) -> FakeFuture:
        described = array.__cuda_array_interface__
        assert described["typestr"] == "|u1" and described["shape"][0] >= size
        self.kvikio.memory[described["data"][0]] = os.pread(self.fd, size, 0)
        self.kvikio.tasks.add(task_size)
        return FakeFuture(size - self.kvikio.lost_bytes)

    def pwrite(self, array: Any, task_size: int) -> FakeFuture:
        described = array.__cuda_array_interface__
        content = self.kvikio.memory[described["data"][0]][: described["shape"][0]]
        return FakeFuture(os.pwrite(self.fd, content, 0) - self.kvikio.lost_bytes)


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKvikio]:
    fake = FakeKvikio()
    monkeypatch.setattr(driver, "look", lambda: driver.Found(kvikio=True, libcuda=True))
    monkeypatch.setattr(driver, "has_device", lambda: True)
    for name in ("kvikio", "kvikio.defaults", "kvikio.cufile_driver"):
        monkeypatch.setitem(__import__("sys").modules, name, fake)  # type: ignore[arg-type]
    yield fake


def connect(root: Path, host: Host, **options: Any) -> GdsConnector:
    defaults = {option.name: option.default for option in OPTIONS}
    return opening.open_connector(f"{root}/kv", {**defaults, **options}, host.services)


def device(nbytes: int, address: int = DEVICE) -> Buffer:
    return Buffer(None, address, nbytes, MemoryKind.DEVICE)


def test_device_memory_goes_by_its_address(tmp_path: Path, host: Host, kvikio: FakeKvikio) -> None:
    store = connect(tmp_path, host, task_size_bytes=1 << 20)
    assert store.capabilities.memory == set(MemoryKind)
    kvikio.memory[DEVICE] = b"tokens" * 1000
    assert store.put_from([b"k"], [device(6000)], within(5)) == [Status.OK]
    target = device(8192, DEVICE + 65536)
    assert store.get_into([b"k"], [target], within(5)) == [GetResult(Status.OK, 6000)]
    assert kvikio.memory[DEVICE + 65536] == b"tokens" * 1000
    assert kvikio.tasks == {1 << 20}
    found = store.get_into([b"k"], [device(5999)], within(5))
    assert found == [GetResult(Status.SIZE_MISMATCH, 6000)]
    store.close()


def test_fewer_bytes_than_asked_for_are_a_failure(
    tmp_path: Path, host: Host, kvikio: FakeKvikio
) -> None:
    store = connect(tmp_path, host)
    kvikio.memory[DEVICE] = b"x" * 100
    store.put_from([b"k"], [device(100)], within(5))
    kvikio.lost_bytes = 1
    assert store.put_from([b"new"], [device(100)], within(5)) == [Status.FAILED]
    assert store.get_into([b"k"], [device(100)], within(5)) == [GetResult(Status.FAILED)]
    assert store.exists([b"k", b"new"], within(5)) == [Status.OK, Status.MISS]
    store.close()


def test_regions_of_device_memory_are_registered_once_and_given_back(
    tmp_path: Path, kvikio: FakeKvikio
) -> None:
    first = Region(1, DEVICE, 4096, MemoryKind.DEVICE)
    host = Host(tmp_path, regions=[first, Region(2, 4096, 4096, MemoryKind.PINNED)])
    store = connect(tmp_path, host)
    assert store.capabilities.regions
    assert kvikio.registered == {DEVICE: 4096}
    store.register_region(first)
    second = Region(3, DEVICE + 4096, 8192, MemoryKind.DEVICE)
    store.register_region(second)
    assert kvikio.registered == {DEVICE: 4096, DEVICE + 4096: 8192}
    store.unregister_region(second)
    store.unregister_region(second)
    assert kvikio.registered == {DEVICE: 4096}
    store.close()
    assert kvikio.registered == {}


def test_a_region_that_cannot_be_registered_is_counted_and_works(
    tmp_path: Path, host: Host, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, Count] = {}
    services = host.services
    object.__setattr__(services, "counter", lambda name: counts.setdefault(name, Count()))
    store = connect(tmp_path, host)
    store.register_region(Region(1, DEVICE + (1 << 30), 4096, MemoryKind.DEVICE))
    assert counts["gds_regions_failed"].value == 1
    kvikio.memory[DEVICE + (1 << 30)] = b"x" * 100
    assert store.put_from([b"k"], [device(100, DEVICE + (1 << 30))], within(5)) == [Status.OK]
    store.close()


def test_settings_of_the_process_only_ever_grow(
    tmp_path: Path, host: Host, kvikio: FakeKvikio
) -> None:
    connect(tmp_path, host, queue_depth=16).close()
    assert kvikio.settings == {"num_threads": 16}
    connect(tmp_path, host, queue_depth=4, direct=True).close()
    assert kvikio.settings == {
        "num_threads": 16, "auto_direct_io_read": True, "auto_direct_io_write": True,
    }  # fmt: skip


def test_without_gds_nothing_direct_is_claimed(
    tmp_path: Path, host: Host, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvikio, "is_compat_mode_preferred", lambda: True)
    claims = connect(tmp_path, host, direct=True).capabilities
    assert MemoryKind.DEVICE in claims.memory
    assert not claims.zero_copy and not claims.regions


def test_auto_with_a_kvikio_that_does_not_import_goes_by_system_calls(
    tmp_path: Path, host: Host, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "kvikio", None)  # type: ignore[arg-type]
    store = connect(tmp_path, host)
    assert store.health(within(5)).details == {"io": "posix"}
    assert "can't be imported" in log.text
