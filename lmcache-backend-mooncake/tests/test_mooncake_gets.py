"""Gets: sizes, lanes that meet on a key, and what happens between the calls of one read."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from mooncake_support import Open, get, put

from lmcache_backend_mooncake.calls import Calls
from lmcache_backend_mooncake.codes import Code
from lmcache_backend_mooncake.server import MooncakeServer
from lmcache_conformance import Memory, within
from lmcache_conformance.memory import value
from lmcache_core.sdk import GetResult, Status

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 4095, 65_537, MIB + 3])
def test_a_target_may_be_larger_but_not_smaller(
    shared_server: MooncakeServer, opened: Open, size: int
) -> None:
    store = opened(shared_server.url).store
    key = b"size%d" % size
    assert put(store, key, value(1, size)) is Status.OK
    for room in (size, size + 1, 2 * size):
        assert get(store, key, room) == (GetResult(Status.OK, size), value(1, size))
    if size > 1:
        assert get(store, key, size - 1)[0] == GetResult(Status.SIZE_MISMATCH, size)


def test_one_batch_has_every_answer(shared_server: MooncakeServer, opened: Open) -> None:
    store = opened(shared_server.url).store
    for name in (b"fits", b"small", b"large"):
        assert put(store, name, value(1, 5000)) is Status.OK
    memory = Memory([5000, 5000, 4000, 6000, 5000])
    keys = [b"fits", b"absent", b"small", b"large", b"fits"]
    assert store.get_into(keys, memory.buffers(), within(5)) == [
        GetResult(Status.OK, 5000),
        GetResult(Status.MISS),
        GetResult(Status.SIZE_MISMATCH, 5000),
        GetResult(Status.OK, 5000),
        GetResult(Status.OK, 5000),
    ]
    for index in (0, 3, 4):
        assert memory.bytes_of(index)[:5000] == value(1, 5000)
    assert memory.canaries_intact()


def test_lanes_that_read_the_same_keys_end_each_others_sessions_and_all_get_them(
    shared_server: MooncakeServer, opened: Open
) -> None:
    """The library keeps one session a key, whoever began it."""
    store = opened(shared_server.url).store
    keys = [b"shared%d" % number for number in range(8)]
    for number, key in enumerate(keys):
        assert put(store, key, value(number, MIB)) is Status.OK
    wrong: list[Any] = []

    def read() -> None:
        memory = Memory([MIB] * len(keys))
        for _ in range(25):
            memory.array[:] = 0
            results = store.get_into(keys, memory.buffers(), within(10))
            content = [memory.bytes_of(number) for number in range(len(keys))]
            if results != [GetResult(Status.OK, MIB)] * len(keys) or content != expected:
                wrong.append(results)

    expected = [value(number, MIB) for number in range(len(keys))]
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Library:
    """A store of one value in the library's calls, with something that happens between two."""

    def __init__(self, size: int, **happens: Any) -> None:
        self.size, self.happens = size, happens
        self.asked: list[str] = []

    def _call(self, name: str, answer: Any) -> Any:
        self.asked.append(name)
        return self.happens.get(name, answer)

    def batch_get_session_start(self, keys: list[str]) -> Any:
        return self._call("start", [0])

    def batch_get_into_multi_buffer_ranges(
        self, keys: list[str], at: Any, sizes: list[list[int]], offsets: Any
    ) -> Any:
        moved = sizes[0][0] if sizes[0][0] <= self.size else int(Code.INVALID_PARAMS)
        return self._call("ranges", [moved])

    def batch_get_session_end(self, keys: list[str]) -> int:
        return int(self._call("end", 0))

    def batch_get_replica_desc(self, keys: list[str]) -> Any:
        return self._call("replicas", {keys[0]: [Replica(self.size)]})

    def batch_get_into(self, keys: list[str], at: Any, sizes: list[int]) -> Any:
        fits = self.size <= sizes[0]
        return self._call("into", [self.size if fits else int(Code.INVALID_PARAMS)])

    def batch_is_exist(self, keys: list[str]) -> Any:
        return self._call("exists", [1])

    def get_size(self, key: str) -> int:
        return self.size


class Replica:
    """A descriptor, as far as it is asked."""

    def __init__(self, size: int, in_memory: bool = True) -> None:
        self.size, self.is_memory_replica = size, lambda: in_memory
        self.get_memory_descriptor = lambda: self
        self.buffer_descriptor = self


SESSION = ["start", "ranges", "end", "replicas"]
MISS, FAIL = int(Code.OBJECT_NOT_FOUND), int(Code.TRANSFER_FAIL)


@pytest.mark.parametrize(
    ("happens", "code", "asked"),
    [
        ({}, 100, SESSION),
        ({"start": [MISS]}, MISS, ["start"]),
        # On an SSD alone.
        ({"start": [-702]}, 100, ["start", "into", "exists"]),
        # Another lane ended the session.
        ({"ranges": [int(Code.INVALID_PARAMS)]}, 100, [*SESSION, "into", "exists"]),
        # The lender died; another one has the value.
        ({"ranges": [FAIL]}, 100, [*SESSION, "into", "exists"]),
        ({"ranges": [FAIL], "into": [FAIL]}, FAIL, [*SESSION, "into"]),
        # Deleted during the read, or put anew with another size.
        ({"replicas": {}, "into": [MISS]}, MISS, [*SESSION, "into"]),
        ({"replicas": {"k": [Replica(99)]}, "into": [99]}, 99, [*SESSION, "into", "exists"]),
        ({"replicas": {"k": [Replica(100, False)]}}, 100, [*SESSION, "into", "exists"]),
        ({"replicas": {}, "exists": [0]}, MISS, [*SESSION, "into", "exists"]),
    ],
)
def test_what_the_session_does_not_settle_is_asked_for_again(
    happens: dict[str, Any], code: int, asked: list[str]
) -> None:
    library = Library(100, **happens)
    codes, true_sizes = calls_of(library).get(["k"], [4096], [100], time.monotonic() + 5)
    assert (codes, true_sizes, library.asked) == ([code], {}, asked)


def test_a_part_of_a_larger_value_is_no_answer() -> None:
    library = Library(200)
    codes, true_sizes = calls_of(library).get(["k"], [4096], [100], time.monotonic() + 5)
    assert codes == [Code.INVALID_PARAMS] and true_sizes == {0: 200}


@pytest.mark.parametrize("harm", [{"replicas": {}}, {"ranges": [int(Code.INVALID_PARAMS)]}])
def test_what_is_not_settled_by_the_deadline_is_no_value(harm: dict[str, Any]) -> None:
    library = Library(100, **harm)
    codes, _ = calls_of(library).get(["k"], [4096], [100], time.monotonic() - 1)
    assert codes == [Code.LEASE_EXPIRED] and library.asked == SESSION


def test_a_session_ends_when_the_read_raises() -> None:
    class Broken(Library):
        def batch_get_into_multi_buffer_ranges(self, *given: Any) -> Any:
            raise RuntimeError("broken")

    library = Broken(100)
    with pytest.raises(RuntimeError, match="broken"):
        calls_of(library).get(["k"], [4096], [100], time.monotonic() + 5)
    assert library.asked == ["start", "end"]


def calls_of(library: Library) -> Calls:
    return Calls(library, None, master=("127.0.0.1", 1))
