"""The fake device has teeth: each rule of page copies, left out, shows as wrong bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import device_rounds as rounds
import pytest
from fake_device import FakeDevice, Stream
from fake_rig import ONE, SEEDS, FakeRig, chain, copy_thread, failing_load

from lmcache_core.transfer import copier as module
from lmcache_core.transfer.copier import DeviceCopy
from lmcache_core.transfer.page_moves import CopyBatch


class Unordered(FakeDevice):
    """Waits of one stream are forgotten."""

    forgets = ""

    def wait(self, stream: Stream, event: Any) -> None:
        if stream.name != self.forgets:
            super().wait(stream, event)


class StoresBeforeCompute(Unordered):
    forgets = "stores"


class LoadsBeforeCompute(Unordered):
    forgets = "loads"


class ForwardBeforeLoad(Unordered):
    forgets = "compute"


class EventBeforeTheLastPiece(FakeDevice):
    def record(self, stream: Stream) -> Any:
        event = super().record(stream)
        if stream is not self.compute and len(stream.queue) > 1:
            stream.queue[-1], stream.queue[-2] = stream.queue[-2], stream.queue[-1]
        return event


class EventOfTheComputeStream(FakeDevice):
    def record(self, stream: Stream) -> Any:
        return super().record(self.compute)


class DoneAtOnce(FakeDevice):
    def query(self, event: Any) -> bool:
        return True


class WaitBeforeRecord(FakeDevice):
    """A wait for an event that is recorded after it."""

    def wait(self, stream: Stream, event: Any) -> None:
        event.recorded = False
        super().wait(stream, event)


class AnyOrderForStores(FakeDevice):
    def any_order(self, to_host: bool) -> bool:
        return True


class CopyOnAnotherStream(FakeDevice):
    """No order between a copy and its waits and events."""

    def copy(self, stream: Stream, batch: CopyBatch, *, to_host: bool) -> None:
        super().copy(self.add_stream("another"), batch, to_host=to_host)


class ForgetfulCopy(DeviceCopy):
    """Address arrays are freed when the call returns."""

    def _start(self, after: Any, batches: Sequence[CopyBatch], *, to_host: bool) -> None:
        super()._start(after, batches, to_host=to_host)
        self._batches = ()


class CopyBeforeWait(DeviceCopy):
    def _start(self, after: Any, batches: Sequence[CopyBatch], *, to_host: bool) -> None:
        assert self._api is not None
        for batch in batches:
            self._api.copy(self._stream, batch, to_host=to_host)
        self._api.wait(self._stream, after)
        self._batches, self._submitted = batches, self._has_event(self._api)


class WaitDoesNotWait(DeviceCopy):
    def wait(self) -> bool:
        self._end()
        return True


class ErrorMeansDone(DeviceCopy):
    def _fail(self, error: Exception) -> None:
        super()._fail(error)
        self._end()

    def _has_event(self, api: Any) -> bool:
        return self._api is not None and super()._has_event(api)


def both_rounds(rig: FakeRig) -> None:
    rounds.store_round(rig, rig.moves(), rig.rng)
    rounds.load_round(rig, rig.moves(), rig.rng)


def caught(play: Callable[[int], None]) -> int:
    """How many seeds end with wrong bytes."""
    found = 0
    for seed in SEEDS:
        try:
            play(seed)
        except rounds.WrongBytes:
            found += 1
    return found


@pytest.mark.parametrize(
    "fake",
    [
        StoresBeforeCompute,
        LoadsBeforeCompute,
        ForwardBeforeLoad,
        EventBeforeTheLastPiece,
        EventOfTheComputeStream,
        DoneAtOnce,
        WaitBeforeRecord,
        AnyOrderForStores,
        CopyOnAnotherStream,
    ],
)
def test_a_rule_of_order_left_out_gives_wrong_bytes(fake: type[FakeDevice]) -> None:
    assert caught(lambda seed: both_rounds(FakeRig(seed, fake=fake)))


@pytest.mark.parametrize("copy", [ForgetfulCopy, CopyBeforeWait, WaitDoesNotWait])
def test_a_rule_of_the_copy_left_out_gives_wrong_bytes(
    copy: type[DeviceCopy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DeviceCopy", copy)
    assert caught(lambda seed: both_rounds(FakeRig(seed)))


def test_a_failure_that_ends_a_running_copy_gives_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DeviceCopy", ErrorMeansDone)
    assert caught(lambda seed: failing_load(FakeRig(seed), "copy"))


def test_copies_of_the_same_pages_without_order_give_wrong_bytes() -> None:
    assert caught(lambda seed: chain(FakeRig(seed), ordered=False))


def test_a_copy_thread_without_the_fence_gives_wrong_bytes() -> None:
    assert caught(lambda seed: copy_thread(FakeRig(seed), fenced=False))


def test_a_slot_taken_before_the_load_is_done_gives_wrong_bytes() -> None:
    def play(seed: int) -> None:
        rig = FakeRig(seed)
        rig.host[64:80] = 1
        copy = rig.copier.submit(ONE, to_host=False)
        rig.host[64:80] = 2  # too early
        assert copy.wait()
        rounds.same(rig.read_now((0, 2)), 1, "another chunk's bytes")

    assert caught(play)


def test_without_a_broken_rule_no_seed_is_caught() -> None:
    assert caught(lambda seed: both_rounds(FakeRig(seed))) == 0
