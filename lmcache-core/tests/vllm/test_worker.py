"""The worker's half without an engine: the fence, failed copies, what is reported when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from lmcache_core.cache import LocalArena
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.geometry import Group
from lmcache_core.integrations.vllm.metadata import (
    Job,
    Span,
    StepMetadata,
    WorkerMetadata,
)
from lmcache_core.integrations.vllm.movers import PoolMover
from lmcache_core.integrations.vllm.worker import Worker
from lmcache_core.memory.arena import Arena
from lmcache_core.metrics import Metrics

GROUP = Group.of(index=0, layers=1, block_size=128, page_bytes=64, window=None, chunk_size=256)


class SlowPages:
    """Copies that wait for a gate, and fail when told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.fail = False
        self.copied = 0

    def offload(self, arena: Arena, spans: Iterable[Span]) -> None:
        assert self.gate.wait(10)
        if self.fail:
            raise OSError("the copy failed")
        self.copied += len(list(spans))

    onboard = offload


@pytest.fixture
def pages() -> SlowPages:
    return SlowPages()


@pytest.fixture
def worker(pages: SlowPages) -> Iterator[Worker]:
    made = Worker(EngineConfig(prefault=False), [(GROUP, ["layer"])])
    made._mover = PoolMover(pages, threads=2, metrics=Metrics())
    arena = Arena.create(1 << 20, prefault=False, warn=print)
    made._attach(LocalArena(arena.ref, arena))
    yield made
    pages.gate.set()
    made.close()
    arena.close()


def step(worker: Worker, fence: set[int]) -> StepMetadata:
    assert worker._handle is not None
    return StepMetadata(worker._handle, fence=frozenset(fence))


def job(number: int, *blocks: int, parked: bool = False) -> Job:
    return Job(number, f"r{number}", (Span(0, 0, 0, 0, blocks),), parked)


def test_a_step_that_overwrites_other_pages_does_not_wait(worker: Worker, pages: SlowPages) -> None:
    worker.start_stores([job(1, 3, 4)])
    worker.handle_step(step(worker, {5, 6}))
    assert pages.copied == 0
    assert worker.report() is None, "nothing is reported before it is done"


def test_a_step_that_overwrites_a_page_in_copy_waits_for_that_copy(
    worker: Worker, pages: SlowPages
) -> None:
    worker.start_stores([job(1, 3, 4)])
    entered = threading.Thread(target=worker.handle_step, args=(step(worker, {4}),))
    entered.start()
    entered.join(0.1)
    assert entered.is_alive(), "the forward must not start while page 4 is read"
    pages.gate.set()
    entered.join(5)
    assert not entered.is_alive()
    assert worker.report() == WorkerMetadata(done={1: 1})


def test_a_parked_load_is_reported_once_and_only_when_its_last_copy_returned(
    worker: Worker, pages: SlowPages
) -> None:
    worker.start_loads([job(1, 3, 4, parked=True)])
    assert worker.finished_loads() == set()
    pages.gate.set()
    end = time.monotonic() + 5
    found: set[str] = set()
    while not found and time.monotonic() < end:
        found = worker.finished_loads()
    assert found == {"r1"}
    assert worker.finished_loads() == set()
    assert worker.failed_blocks() == set()


@pytest.mark.parametrize("parked", [False, True])
def test_a_failed_load_names_its_pages_and_its_job(
    worker: Worker, pages: SlowPages, parked: bool
) -> None:
    pages.fail = True
    pages.gate.set()
    worker.start_loads([job(1, 3, 4, parked=parked)])
    end = time.monotonic() + 5
    while worker._loads and time.monotonic() < end:
        worker.finished_loads()
    assert worker.failed_blocks() == {3, 4}
    assert worker.report() == WorkerMetadata(failed={1: 1})


def test_a_failed_store_is_reported_as_failed(worker: Worker, pages: SlowPages) -> None:
    pages.fail = True
    pages.gate.set()
    worker.start_stores([job(1, 3)])
    worker.handle_step(step(worker, {3}))
    assert worker.report() == WorkerMetadata(failed={1: 1})


def test_reports_of_two_workers_add_up() -> None:
    total = WorkerMetadata({1: 1, 2: 1}).aggregate(WorkerMetadata({1: 1}, {2: 1}))
    assert total == WorkerMetadata({1: 2, 2: 1}, {2: 1})
