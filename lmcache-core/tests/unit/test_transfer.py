"""Executor and breaker."""

from __future__ import annotations

import threading

from lmcache_core.transfer.breaker import Breaker
from lmcache_core.transfer.executor import Completions, Lane, ThreadExecutor


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


def test_failures_in_a_row_open_the_breaker_and_a_success_resets_them() -> None:
    breaker = Breaker(failures_to_open=3, probe_interval_s=1.0)
    assert [breaker.failure(0.0, "x") for _ in range(2)] == [False, False]
    breaker.success()
    assert [breaker.failure(0.0, "x") for _ in range(3)] == [False, False, True]
    assert breaker.is_open


def test_one_fatal_failure_opens_it() -> None:
    breaker = Breaker(failures_to_open=3, probe_interval_s=1.0)
    assert breaker.failure(0.0, "frozen", fatal=True)
    assert (breaker.is_open, breaker.reason) == (True, "frozen")


def test_while_open_one_probe_an_interval_and_only_it_closes() -> None:
    breaker = Breaker(failures_to_open=1, probe_interval_s=1.0)
    breaker.failure(10.0, "x")
    assert not breaker.wants_probe(10.5)
    assert breaker.wants_probe(11.0)
    assert not breaker.wants_probe(12.0), "one at a time"
    breaker.success()
    assert breaker.is_open, "a late answer does not close it"
    breaker.probed(12.0, ok=False)
    assert not breaker.wants_probe(12.5)
    assert breaker.wants_probe(13.0)
    breaker.probed(13.1, ok=True)
    assert not breaker.is_open
