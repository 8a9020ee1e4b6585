"""Page copies keep their order on a device that runs late."""

from __future__ import annotations

from typing import Any

import device_rounds as rounds
import numpy as np
import pytest
from fake_device import DEVICE_BASE, DeviceError, FakeDevice, Stream, layers_of
from fake_rig import HOST_NBYTES, ONE, SEEDS, FakeRig, chain, copy_thread, failing_load
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.sdk.errors import ConfigError, ContractViolation
from lmcache_core.transfer.copier import CopyRefused, DeviceCopier
from lmcache_core.transfer.page_moves import CopyBatch, LayerPages, Moves, PageMove, merged_runs

LAYOUTS = dict(
    outer=st.sampled_from(["layer", "block", "apart"]),
    pages=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    gap=st.sampled_from([0, 0, 8]),
    max_batch=st.sampled_from([1, 3, 4096]),
    pinned=st.sampled_from([True, True, False]),
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), loads=st.lists(st.booleans(), max_size=4), **LAYOUTS)
def test_every_layout_and_move_ends_with_the_bytes_of_a_plain_copy(
    seed: int, loads: list[bool], **layout: Any
) -> None:
    rig = FakeRig(seed, **layout)
    for load in loads:
        (rounds.load_round if load else rounds.store_round)(rig, rig.moves(), rig.rng)
    assert rig.copier.close(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_loads_and_stores_in_flight_together(seed: int) -> None:
    rig = FakeRig(seed, outer="block")
    stored = [PageMove(i, 0, 4, 64 * i) for i in range(3)]
    loaded = [PageMove(i, 4, 4, 1024 + 64 * i) for i in range(3)]
    model, cached = rounds.some_bytes(rig.rng, 192), rounds.some_bytes(rig.rng, 192)
    rig.host[1024:1216] = cached
    for page, s in rounds.slots(rig.layers, stored).items():
        rig.write(page, model[s])
    store, load = rig.store(stored), rig.copier.submit(loaded, to_host=False)
    for copy in (load, store) if rig.rng.random() < 0.5 else (store, load):
        assert copy.wait() and copy.error() is None
    assert np.array_equal(rig.host[:192], model)
    for page, s in rounds.slots(rig.layers, loaded).items():
        assert np.array_equal(rig.read_now(page), cached[s.start - 1024 : s.stop - 1024])


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_of_the_same_pages_are_ordered_through_compute_alone(seed: int) -> None:
    chain(FakeRig(seed))


def test_a_load_does_not_queue_behind_stores() -> None:
    rig = FakeRig()
    store = rig.store(ONE)
    next(s for s in rig.device.streams if s.name == "stores").stalled = True
    load = rig.copier.submit([PageMove(0, 5, 1, 0)], to_host=False)
    assert load.wait() and not store.done()


@pytest.mark.parametrize("seed", SEEDS)
def test_from_a_copy_thread_the_fence_of_the_model_runner_orders(seed: int) -> None:
    copy_thread(FakeRig(seed), fenced=True)


# Planning.


def test_pages_adjacent_on_both_sides_are_one_copy() -> None:
    layers, _ = layers_of("layer", [16, 16], 8, 0)
    assert runs(layers, [PageMove(0, 2, 3, 0), PageMove(0, 5, 1, 48)]) == [(32, 0, 64)]
    assert runs(layers, [PageMove(0, 5, 1, 48), PageMove(0, 2, 3, 0)]) == [(32, 0, 64)]
    assert len(runs(layers, [PageMove(0, 2, 3, 0), PageMove(0, 5, 1, 64)])) == 2
    assert len(runs(layers, [PageMove(0, 2, 1, 0), PageMove(0, 5, 1, 16)])) == 2


def test_moves_may_be_an_array() -> None:
    layers, _ = layers_of("layer", [16, 16], 8, 0)
    moves = [PageMove(0, 2, 3, 0), PageMove(1, 1, 1, 48)]
    assert runs(layers, np.array(moves)) == runs(layers, moves)


def test_block_outer_pages_of_all_layers_are_one_copy() -> None:
    layers, _ = layers_of("block", [16, 8], 8, 0)
    assert runs(layers, [PageMove(0, 3, 1, 0), PageMove(1, 3, 1, 16)]) == [(72, 0, 24)]
    assert len(runs(layers, [PageMove(0, 3, 2, 0)])) == 2, "another layer's page is between them"


def test_no_copy_crosses_from_one_allocation_to_the_next() -> None:
    layers, _ = layers_of("apart", [16, 16], 8, 0)
    assert runs(layers, [PageMove(0, 7, 1, 0), PageMove(1, 0, 1, 16)]) == [
        (112, 0, 16),
        (128, 16, 16),
    ]


def runs(layers: list[LayerPages], moves: Moves) -> list[tuple[int, ...]]:
    rows = [(p.address, p.blocks, p.page_bytes, p.block_stride, p.allocation) for p in layers]
    device, host, nbytes = merged_runs(np.array(rows), HOST_NBYTES, moves)
    return [*zip((device - DEVICE_BASE).tolist(), host.tolist(), nbytes.tolist())]


@pytest.mark.parametrize(
    "move",
    [
        PageMove(3, 0, 1, 0),
        PageMove(-1, 0, 1, 0),
        PageMove(0, -1, 1, 0),
        PageMove(0, 7, 2, 0),
        PageMove(0, 0, 0, 0),
        PageMove(0, 0, 1, -1),
        PageMove(0, 0, 1, HOST_NBYTES - 15),
        PageMove(0, 2**62, 2**62, 0),
    ],
)
@pytest.mark.parametrize("to_host", [True, False])
def test_a_move_outside_of_the_layers_or_the_arena_touches_nothing(
    move: PageMove, to_host: bool
) -> None:
    rig = FakeRig()
    copy = rig.copier.submit([*ONE, move], to_host=to_host)
    assert copy.done() and isinstance(copy.error(), ContractViolation)
    assert not any(name == "copy" for name, _ in rig.device.calls)


def test_moves_that_overlap_in_their_target_are_refused() -> None:
    rig = FakeRig()
    twice = [PageMove(0, 2, 1, 0), PageMove(1, 2, 1, 8)]
    assert isinstance(rig.store(twice).error(), ContractViolation)
    same_page = [PageMove(0, 2, 2, 0), PageMove(0, 3, 1, 64)]
    copy = rig.copier.submit(same_page, to_host=False)
    assert isinstance(copy.error(), ContractViolation)
    both_from_one = [PageMove(0, 2, 1, 0), PageMove(1, 2, 1, 0)]
    copy = rig.copier.submit(both_from_one, to_host=False)
    assert copy.wait() and copy.error() is None


def test_batches_are_bounded_and_no_move_is_done_at_once() -> None:
    rig = FakeRig(max_batch=2)
    scattered = [PageMove(0, i, 1, 100 * i) for i in range(5)]
    assert rig.store(scattered).wait()
    assert [name for name, _ in rig.device.calls].count("copy") == 3
    nothing = rig.store([])
    assert nothing.done() and nothing.error() is None


# Not blocking, bounds, lifetimes.


def test_submit_waits_for_nothing() -> None:
    rig = FakeRig()
    rig.write((0, 2), np.ones(16, np.uint8))
    copies = [rig.copier.submit(ONE, to_host=to_host) for to_host in (True, False)]
    assert copies[1].order_before_compute()
    names = {name for name, _ in rig.device.calls}
    assert names == {"record", "wait", "copy"}, "each only enqueues"
    assert len(rig.device.compute.queue) > 0, "nothing has run"


def test_the_order_of_calls() -> None:
    rig = FakeRig(max_batch=1)
    rig.store([PageMove(0, 0, 1, 0), PageMove(0, 4, 1, 500)]).order_before_compute()
    assert rig.device.calls == [
        ("record", "compute"),
        ("wait", "stores"),
        ("copy", "stores"),
        ("copy", "stores"),
        ("record", "stores"),
        ("wait", "compute"),
    ]


def test_memory_that_is_not_pinned_is_said_once_and_copied_right() -> None:
    rig = FakeRig(pinned=False)
    rounds.store_round(rig, rig.moves(), rig.rng)
    rounds.load_round(rig, rig.moves(), rig.rng)
    assert len(rig.warnings) == 1 and "not pinned" in rig.warnings[0]
    assert FakeRig().warnings == []


def test_more_copies_than_allowed_are_refused_in_one_direction_only() -> None:
    rig = FakeRig(max_in_flight=2)
    rig.device.compute.stalled = True  # a forward that lasts
    first = [rig.store(ONE), rig.store(ONE)]
    refused = rig.store(ONE)
    assert refused.done() and isinstance(refused.error(), CopyRefused)
    assert rig.copier.submit(ONE, to_host=False).error() is None
    rig.device.compute.stalled = False
    assert all(copy.wait() for copy in first)
    assert rig.store(ONE).error() is None


def test_a_copy_that_another_thread_is_enqueuing_has_not_ended() -> None:
    class LookedAt(FakeDevice):
        def copy(self, stream: Stream, batch: CopyBatch, *, to_host: bool) -> None:
            super().copy(stream, batch, to_host=to_host)
            self.finish()  # a fast device: what was enqueued so far has run
            seen.append([rig.copier.in_flight() for _ in range(3)])

    seen: list[list[int]] = []
    rig = FakeRig(fake=LookedAt, max_batch=1)
    copy = rig.store([PageMove(0, 0, 1, 0), PageMove(0, 4, 1, 500)])
    assert seen == [[1, 1, 1]] * 2
    assert copy.wait() and rig.copier.in_flight() == 0


def test_close_waits_with_a_bound_and_says_whether_all_ended() -> None:
    rig = FakeRig()
    copy = rig.store(ONE)
    rig.device.compute.stalled = True
    assert not rig.copier.close(0.01), "a copy runs: memory may not be freed"
    late = rig.store(ONE)
    assert late.done() and isinstance(late.error(), CopyRefused)
    rig.device.compute.stalled = False
    assert rig.copier.close(1) and copy.done() and copy.error() is None
    assert rig.copier.close(0)
    with pytest.raises(CopyRefused):
        rig.copier.fence()


def test_after_close_nothing_of_the_device_is_held() -> None:
    rig = FakeRig()
    copy = rig.store(ONE)
    assert rig.copier.close(1)
    held = [copy._api, copy._batches, rig.copier._api]
    assert held == [None, (), None]


def test_a_copy_that_the_caller_forgets_is_still_kept() -> None:
    rig = FakeRig()
    rig.write((0, 2), np.full(16, 7, np.uint8))
    rig.store(ONE)
    rig.finish()
    assert np.all(rig.host[64:80] == 7)


def test_limits_and_layers_are_checked() -> None:
    rig = FakeRig()
    for layers, options in (([], {}), (rig.layers, {"max_batch": 0})):
        with pytest.raises(ConfigError):
            DeviceCopier(layers, rig.device, warn=print, **options)


# Failures of the driver.


@pytest.mark.parametrize("call", ["record", "wait", "query", "synchronize", "copy"])
@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_is_reported_and_done_means_that_nothing_is_touched_any_more(
    call: str, seed: int
) -> None:
    failing_load(FakeRig(seed), call)


def test_a_device_that_never_answers_keeps_the_pages() -> None:
    rig = FakeRig()
    copy = rig.copier.submit(ONE, to_host=False)
    rig.device.failures.update(query=10**9, synchronize=10**9)
    assert not copy.wait() and not copy.done() and not rig.copier.close(0.01)
    assert isinstance(copy.error(), DeviceError)
    rig.device.failures.clear()
    assert copy.wait() and copy.error() is not None, "it ended, and stays a failure"


def test_an_event_that_could_not_be_recorded_is_recorded_later() -> None:
    rig = FakeRig()
    fence = rig.copier.fence()
    rig.device.failures.update(copy=1, record=2)
    copy = rig.copier.submit(ONE, to_host=False, after=fence)
    assert not copy.order_before_compute()
    assert not copy.done(), "no event: nothing is known"
    assert copy.wait()
    assert str(copy.error()) == "copy", "the first error is the cause"


def test_compute_that_can_not_be_ordered_says_so() -> None:
    rig = FakeRig()
    copy = rig.copier.submit(ONE, to_host=False)
    rig.device.failures["wait"] = 1
    assert not copy.order_before_compute()
    assert isinstance(copy.error(), DeviceError)
