"""The arena: shared, sealed, bounds-checked, closed without pulling memory from under views."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from lmcache_core.memory.arena import Arena, ArenaError, ArenaRef
from lmcache_core.sdk.buffers import MemoryKind
from lmcache_core.sdk.errors import ConfigError

MIB = 1 << 20


def make(nbytes: int = MIB, *, prefault: bool = False) -> Arena:
    return Arena.create(nbytes, prefault=prefault, warn=lambda text: None)


class FakePinner:
    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.calls: list[tuple[str, int]] = []

    def register(self, address: int, nbytes: int) -> bool:
        self.calls.append(("register", address))
        return self.works

    def unregister(self, address: int) -> bool:
        self.calls.append(("unregister", address))
        return True


def test_array_and_view_are_the_same_bytes() -> None:
    arena = make()
    view = arena.view(4096, 8)
    view[:] = b"12345678"
    assert bytes(arena.array[4096:4104]) == b"12345678"
    assert (view.format, view.readonly, view.nbytes) == ("B", False, 8)
    assert arena.address == arena.array.ctypes.data and arena.address % 4096 == 0
    assert arena.array.dtype == np.uint8 and arena.array.shape == (MIB,)
    view.release()
    assert arena.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, MIB + 1), (MIB, 1)])
def test_views_outside_raise(offset: int, nbytes: int) -> None:
    arena = make()
    with pytest.raises(ArenaError):
        arena.view(offset, nbytes)
    arena.close()


@pytest.mark.parametrize("nbytes", [0, -4096])
def test_no_bytes_is_a_config_error(nbytes: int) -> None:
    with pytest.raises(ConfigError):
        make(nbytes)


def test_a_size_that_can_not_be_had_raises_and_leaks_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError):
        make(1 << 62)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_size_is_sealed() -> None:
    arena = make()
    for nbytes in (4096, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.ref.fd, nbytes)
    arena.close()


def test_another_process_sees_and_writes_the_same_bytes() -> None:
    arena = make()
    arena.array[:4] = 1
    ref = arena.ref
    code = (
        "from lmcache_core.memory.arena import Arena, ArenaRef\n"
        f"a = Arena.attach(ArenaRef({ref.pid}, {ref.fd}, {ref.nbytes}), warn=print)\n"
        "assert bytes(a.view(0, 4)) == bytes([1] * 4)\n"
        "a.array[-1] = 7\n"
        "assert a.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert arena.array[-1] == 7
    arena.close()


def test_an_attached_arena_outlives_its_owner() -> None:
    owner = make()
    owner.array[0] = 9
    other = Arena.attach(owner.ref, warn=lambda text: None, prefault=False)
    assert owner.close()
    assert other.array[0] == 9
    assert other.close()


def test_attach_refuses_what_is_not_that_arena() -> None:
    arena = make()
    read_end, write_end = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    wrong = [
        ArenaRef(os.getpid(), arena.ref.fd, MIB // 2),
        ArenaRef(os.getpid(), arena.ref.fd, 2 * MIB),
        ArenaRef(os.getpid(), read_end, MIB),
        ArenaRef(os.getpid(), 9999, MIB),
        ArenaRef(2**22 + 1, 3, MIB),
    ]
    for ref in wrong:
        with pytest.raises(ArenaError) as raised:
            Arena.attach(ref, warn=lambda text: None)
        assert raised.value.hint
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(read_end)
    os.close(write_end)
    arena.close()


def test_close_leaves_memory_mapped_while_a_view_is_held() -> None:
    arena = make()
    view = arena.view(0, 4)
    view[:] = b"kept"
    assert arena.close() is False
    assert bytes(view) == b"kept"
    with pytest.raises(ArenaError):
        arena.view(0, 1)
    with pytest.raises(ArenaError):
        _ = arena.array
    view.release()
    assert arena.close() is True
    assert arena.close() is True


def test_close_gives_the_file_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert make().close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_prefaulting_touches_every_page_without_changing_it() -> None:
    arena = make(3 * MIB, prefault=True)
    arena.array[5] = 5
    thread = arena._prefault
    assert thread is not None and thread.daemon
    thread.join(10)
    assert not thread.is_alive()
    assert int(arena.array.sum()) == 5
    assert arena.close()


def test_close_stops_prefaulting() -> None:
    arena = make(256 * MIB, prefault=True)
    assert arena.close()
    assert not any(t.name == "lmcache-prefault" for t in threading.enumerate())


def test_a_numa_node_that_is_not_there_is_one_warning() -> None:
    warnings: list[str] = []
    arena = Arena.create(
        MIB, numa_node=1023, huge_pages=False, prefault=False, warn=warnings.append
    )
    assert len(warnings) == 1
    assert arena.close()


def test_the_region_names_its_memory() -> None:
    arena, pinner = make(), FakePinner()
    region = arena.region
    assert (region.region_id, region.nbytes, region.memory) == (1, MIB, MemoryKind.HOST)
    assert (region.address, region.fd) == (arena.address, arena.ref.fd)
    assert arena.pin(pinner) and arena.pin(pinner)  # type: ignore[arg-type]
    assert arena.region.memory is MemoryKind.PINNED
    address = arena.address
    assert arena.close()
    assert pinner.calls == [("register", address), ("unregister", address)]


def test_a_failed_pin_leaves_host_memory() -> None:
    arena = make()
    assert not arena.pin(FakePinner(works=False))  # type: ignore[arg-type]
    assert arena.region.memory is MemoryKind.HOST
    assert arena.close()
    with pytest.raises(ArenaError):
        arena.pin()


def test_a_file_that_was_handed_over_is_the_same_memory() -> None:
    arena = make()
    other = Arena.from_fd(os.dup(arena.ref.fd), MIB, warn=print)
    arena.array[4096:4100] = 7
    assert bytes(other.view(4096, 4)) == b"\7" * 4
    assert arena.close()
    other.array[:] = 1
    assert other.close()


@pytest.mark.parametrize("nbytes", [MIB - 1, MIB + 1, 0, -1])
def test_a_file_of_another_size_is_no_arena(nbytes: int) -> None:
    arena = make()
    fd = os.dup(arena.ref.fd)
    with pytest.raises(ArenaError, match="should have"):
        Arena.from_fd(fd, nbytes, warn=print)
    with pytest.raises(OSError):
        os.fstat(fd)
    arena.close()


def test_a_file_that_its_owner_could_shrink_is_no_arena() -> None:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    with pytest.raises(ArenaError, match="no arena"):
        Arena.from_fd(fd, MIB, warn=print)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_nobody_can_forbid_the_others_to_map_it() -> None:
    arena = make()
    future_write = 0x10
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.ref.fd, fcntl.F_ADD_SEALS, future_write)
    arena.close()
