"""Executor and breaker."""

from __future__ import annotations

import threading

from lmcache_core.transfer.breaker import Breaker
from lmcache_core.transfer.executor import Completions, Lane, Runtime, ThreadExecutor


def test_queued_loads_start_before_queued_stores() -> None:
    executor = ThreadExecutor("t", threads=1, max_queued=10)
    gate, order, done = threading.Event(), [], threading.Event()
    executor.submit(lambda: (gate.wait(5), None)[1], Lane.LOAD)
    for i in range(3):
        executor.submit(lambda i=i: order.append(f"store{i}"), Lane.STORE)
    for i in range(3):
        executor.submit(lambda i=i: order.append(f"load{i}"), Lane.LOAD)
    executor.submit(done.set, Lane.STORE)
    gate.set()
    assert done.wait(5)
    assert order == ["load0", "load1", "load2", "store0", "store1", "store2"]
    assert executor.close(1)


def test_a_full_queue_refuses() -> None:
    executor = ThreadExecutor("t", threads=1, max_queued=2)
    gate, running = threading.Event(), threading.Event()
    executor.submit(lambda: (running.set(), gate.wait(5), None)[2], Lane.STORE)
    assert running.wait(5)
    answers = [executor.submit(lambda: None, Lane.STORE) for _ in range(3)]
    assert answers == [True, True, False]
    assert executor.submit(lambda: None, Lane.LOAD), "lanes have queues of their own"
    gate.set()
    assert executor.close(1)
    assert not executor.submit(lambda: None, Lane.LOAD)


def test_close_does_not_wait_longer_than_told_for_a_stuck_job() -> None:
    executor = ThreadExecutor("t", threads=1, max_queued=2)
    gate, running = threading.Event(), threading.Event()
    executor.submit(lambda: (running.set(), gate.wait(5), None)[2], Lane.STORE)
    assert running.wait(5)
    assert executor.close(0.05) is False
    gate.set()


def test_completions_run_in_order_of_arrival() -> None:
    completions, seen = Completions(), []
    for i in range(3):
        completions.post(lambda i=i: seen.append(i))
    completions.wait(0)
    assert completions.drain() == 3
    assert seen == [0, 1, 2]


def test_arrivals_wake_an_owner_that_waits_for_more_than_them() -> None:
    woken: list[int] = []
    runtime = Runtime(lambda: woken.append(runtime.completions.drain()))
    runtime.completions.post(lambda: None)
    assert woken == [1], "it had arrived before"


def test_stores_leave_a_thread_for_loads() -> None:
    executor = ThreadExecutor("t", threads=3, max_queued=10)
    gate, loaded = threading.Event(), threading.Event()
    running = threading.Semaphore(0)
    for _ in range(3):
        executor.submit(lambda: (running.release(), gate.wait(5), None)[2], Lane.STORE)
    assert running.acquire(timeout=5) and running.acquire(timeout=5)
    executor.submit(loaded.set, Lane.LOAD)
    assert loaded.wait(5), "a load waits for slow stores"
    assert not running.acquire(timeout=0.05), "a third store runs"
    gate.set()
    assert running.acquire(timeout=5), "the third store has its turn"
    assert executor.close(5)


def test_every_calls_until_it_is_told_to_stop() -> None:
    calls, done = [], threading.Event()

    def fire() -> bool:
        calls.append(1)
        if len(calls) == 3:
            done.set()
        return len(calls) < 3

    Runtime().every(0.01, fire)
    assert done.wait(5)
    assert not threading.Event().wait(0.05)
    assert len(calls) == 3


def test_failures_in_a_row_open_the_breaker_and_a_success_resets_them() -> None:
    breaker = Breaker(failures_to_open=3)
    assert [breaker.failure("x") for _ in range(2)] == [False, False]
    breaker.success()
    assert [breaker.failure("x") for _ in range(3)] == [False, False, True]
    assert breaker.is_open


def test_one_fatal_failure_opens_it_and_only_close_closes_it() -> None:
    breaker = Breaker(failures_to_open=3)
    assert breaker.failure("frozen", fatal=True)
    assert (breaker.is_open, breaker.reason) == (True, "frozen")
    assert not breaker.failure("again", fatal=True), "it was open"
    breaker.success()
    assert breaker.is_open, "a late answer does not close it"
    breaker.close()
    assert (breaker.is_open, breaker.reason) == (False, "")
