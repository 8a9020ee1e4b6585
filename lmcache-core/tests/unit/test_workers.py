"""`Workers`: the caller leaves at its deadline, the work is told of when it ends."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache_core.sdk import BackendUnavailable, LeftBehind, Workers


def _nothing() -> None:
    raise AssertionError("the work was not late")


def test_work_in_time_gives_what_it_returns_or_raises() -> None:
    workers = Workers("test")
    assert workers.run(lambda: 7, 5, _nothing) == 7
    with pytest.raises(KeyError):
        workers.run(lambda: {}["absent"], 5, _nothing)
    workers.close()


def alive() -> int:
    return sum(thread.name == "reuse-io" for thread in threading.enumerate())


def none_alive_within(limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while alive() and time.monotonic() < end_s:
        time.sleep(0.01)
    return not alive()


def test_idle_threads_are_used_again_and_end_with_close() -> None:
    workers = Workers("reuse")
    for _ in range(50):
        workers.run(lambda: None, 5, _nothing)
    # A caller that comes before the worker is back in line gets another one.
    assert 1 <= alive() < 10
    assert none_alive_within(10), "an idle thread does not end"
    assert workers.run(lambda: 3, 5, _nothing) == 3
    workers.close()
    assert none_alive_within(5)


def test_late_work_is_left_behind_and_told_of_once_when_it_ends() -> None:
    workers = Workers("test")
    gate, told = threading.Event(), threading.Semaphore(0)
    started_s = time.monotonic()
    with pytest.raises(LeftBehind):
        workers.run(gate.wait, 0.05, told.release)
    assert time.monotonic() - started_s < 2
    assert workers.stuck_calls == 1
    assert not told.acquire(timeout=0.1), "told before the work ended"
    gate.set()
    assert told.acquire(timeout=5)
    assert workers.stuck_calls == 0
    assert not told.acquire(timeout=0.05), "told twice"
    workers.close()


def test_late_work_that_fails_is_told_of_too() -> None:
    workers = Workers("test")
    gate, told = threading.Event(), threading.Event()

    def fail() -> None:
        gate.wait()
        raise OSError("late")

    with pytest.raises(LeftBehind):
        workers.run(fail, 0.01, told.set)
    gate.set()
    assert told.wait(5)
    assert workers.run(lambda: "goes on", 5, _nothing) == "goes on"
    workers.close()


def test_stuck_work_is_bounded_and_recovers() -> None:
    workers = Workers("test", max_stuck=2)
    gate, told = threading.Event(), threading.Semaphore(0)
    for _ in range(2):
        with pytest.raises(LeftBehind):
            workers.run(gate.wait, 0.01, told.release)
    with pytest.raises(BackendUnavailable, match="2 calls hang"):
        workers.run(lambda: None, 1, _nothing)
    gate.set()
    assert told.acquire(timeout=5) and told.acquire(timeout=5)
    assert workers.run(lambda: 1, 5, _nothing) == 1
    workers.close()


def test_whoever_ends_first_decides_for_every_moment() -> None:
    """Work that ends about when its caller leaves is either an answer or left behind, never both,
    never neither."""
    workers = Workers("test", max_stuck=1000)
    for turn in range(200):
        told = threading.Event()
        try:
            late = workers.run(lambda: time.sleep(0.002), 0.002 + turn * 1e-6, told.set) is not None
        except LeftBehind:
            late = True
        assert told.wait(5) if late else not told.is_set()
    end_s = time.monotonic() + 5
    while workers.stuck_calls and time.monotonic() < end_s:
        time.sleep(0.01)
    assert workers.stuck_calls == 0
    workers.close()
