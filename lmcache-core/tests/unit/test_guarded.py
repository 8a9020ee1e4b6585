"""`GuardedLoop`: native calls that hang never touch core's memory late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lmcache_core.sdk import (
    BackendUnavailable,
    Buffer,
    Capabilities,
    GetResult,
    GuardedLoop,
    Health,
    OpContext,
    Status,
)


class Native(GuardedLoop):
    capabilities = Capabilities(max_concurrency=4)

    def __init__(self) -> None:
        super().__init__("native", max_stuck=2)
        self.gate = threading.Event()
        self.gate.set()
        self.values: dict[bytes, bytes] = {}

    def native_exists(self, key: bytes) -> bool:
        self.gate.wait(10)
        return key in self.values

    def native_get(self, key: bytes, target: memoryview) -> int | None:
        self.gate.wait(10)
        value = self.values.get(key)
        if value is not None:
            target[: len(value)] = value
        return None if value is None else len(value)

    def native_put(self, key: bytes, source: bytes) -> None:
        self.gate.wait(10)
        self.values[key] = source

    def native_delete(self, key: bytes) -> None:
        self.values.pop(key, None)

    def health(self, ctx: OpContext) -> Health:
        return Health(ok=True)


@pytest.fixture
def store() -> Iterator[Native]:
    native = Native()
    yield native
    native.gate.set()


def soon(seconds: float = 0.05) -> OpContext:
    return OpContext(deadline_s=time.monotonic() + seconds)


def buffer(data: bytearray) -> Buffer:
    return Buffer(memoryview(data), 4096, len(data))


def test_round_trip(store: Native) -> None:
    target = bytearray(8)
    assert store.put_from([b"k"], [buffer(bytearray(b"value"))], soon(5)) == [Status.OK]
    assert store.get_into([b"k"], [buffer(target)], soon(5)) == [GetResult(Status.OK, 5)]
    assert target[:5] == b"value"
    assert store.delete([b"k"], soon(5)) == [Status.OK]
    assert store.exists([b"k"], soon(5)) == [Status.MISS]


def test_a_hanging_get_is_timed_out_and_never_touches_the_target(store: Native) -> None:
    store.values[b"k"] = b"value"
    target = bytearray(8)
    store.gate.clear()
    assert store.get_into([b"k"], [buffer(target)], soon())[0].status is Status.TIMED_OUT
    store.gate.set()
    end = time.monotonic() + 5
    while store.stuck_calls and time.monotonic() < end:
        time.sleep(0.01)
    assert target == bytearray(8)


def test_at_the_limit_of_stuck_calls_it_is_unavailable_until_they_end(store: Native) -> None:
    store.gate.clear()
    for _ in range(2):
        assert store.exists([b"k"], soon()) == [Status.TIMED_OUT]
    with pytest.raises(BackendUnavailable):
        store.exists([b"k"], soon())
    store.gate.set()
    end = time.monotonic() + 5
    while store.stuck_calls and time.monotonic() < end:
        time.sleep(0.01)
    assert store.exists([b"k"], soon(5)) == [Status.MISS]


def test_close_does_not_wait_for_stuck_calls(store: Native) -> None:
    store.gate.clear()
    store.exists([b"k"], soon())
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < 1.0
