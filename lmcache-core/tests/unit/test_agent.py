"""An instance and its controllers: obeyed once, answered, missed by nobody."""

from __future__ import annotations

import threading
import time

import pytest
from agent_rig import FakeController, controller, joined, settled, store, truth
from scripted import LAYOUT, SLOT_BYTES, Make, Scripted, make, prompt, until
from test_clearing import Gate, Held

from lmcache_core.agent import wire
from lmcache_core.agent.orders import Orders
from lmcache_core.clearing import Clearing
from lmcache_core.layout import LayoutSpec
from lmcache_core.pins import Pins
from lmcache_core.tiers.remote import RemoteTier

__all__ = ["controller", "make"]
KINDS = (wire.ChunkKind(bytes(6), LayoutSpec.of(LAYOUT)),)


def owe(controller: FakeController, **reply: object) -> None:
    with controller.changed:
        controller.owed.append(wire.Reply(controller="", **reply))  # type: ignore[arg-type]


def done(controller: FakeController, ident: str) -> wire.Progress:
    controller.until(lambda: ident in controller.progress and ended(controller.progress[ident]))
    return controller.progress[ident]


def ended(progress: wire.Progress) -> bool:
    return progress.state != "running"


def joined_keys(keys: list[bytes]) -> bytes:
    return b"".join(keys)


def test_an_order_reaches_an_idle_engine_and_is_carried_out_once(
    make: Make, controller: FakeController
) -> None:
    engine = make(Scripted())
    keys = store(engine, 1, 3)
    assert engine.flush(5)
    order = wire.Clear(id="o1", tags=(engine.namespace.tag,))
    with joined(engine, controller):
        owe(controller, orders=(order,))
        progress = done(controller, "o1")
        assert (progress.state, progress.settled, progress.total) == ("done", 6, 6)
        controller.until(lambda: not controller.held)
        store(engine, 1, 3)
        owe(controller, orders=(order,))
        owe(controller, orders=(order,))
        controller.until(lambda: not controller.owed)
        settled(engine)
        assert engine.host.prefix(keys) == 3, "the same order is not carried out again"


def test_an_end_is_told_until_it_was_recorded(make: Make, controller: FakeController) -> None:
    engine = make()
    with joined(engine, controller):
        owe(controller, orders=(wire.Unpin(id="o1", pin="none"),))
        done(controller, "o1")
        before = len(controller.syncs)
        controller.until(lambda: len(controller.syncs) > before + 3)
        assert all(
            [one.id for one in sync.progress] == ["o1"] for sync in controller.syncs[before:]
        )
        owe(controller, recorded=("o1",))
        controller.until(lambda: not controller.last.progress)


def test_pins_come_and_go(make: Make, controller: FakeController) -> None:
    engine = make(Scripted())
    keys = store(engine, 1, 3)
    pin = wire.Pin(
        id="o1", pin="p", tier="host", keys=joined_keys(keys), until_s=time.time() + 60, kinds=KINDS
    )
    with joined(engine, controller):
        owe(controller, orders=(pin,))
        progress = done(controller, "o1")
        assert progress.held == joined_keys(keys) and progress.nbytes == 3 * SLOT_BYTES
        for seed in range(10, 20):
            store(engine, seed, 4)
            settled(engine)
        assert engine.host.prefix(keys) == 3
        owe(controller, orders=(wire.Unpin(id="o2", pin="p"),))
        assert done(controller, "o2").notes == {"unpinned": 1}


def test_a_pin_that_another_replaces_ends(make: Make, controller: FakeController) -> None:
    store_ = Gate()
    engine = make(store_)
    keys = store(engine, 1, 1)
    assert engine.flush(5)
    with engine.owner:
        engine.host.drop(keys)
    store_.go.clear()

    def pin(ident: str, tier: str) -> wire.Pin:
        wanted, until_s = joined_keys(keys), time.time() + 60
        return wire.Pin(id=ident, pin="p", tier=tier, keys=wanted, until_s=until_s, kinds=KINDS)

    with joined(engine, controller):
        owe(controller, orders=(pin("o1", "host"),))
        assert store_.reached.wait(5)
        owe(controller, orders=(pin("o2", "t0"),))
        assert done(controller, "o2").state == "done"
        assert done(controller, "o1").state == "failed"
        store_.go.set()


def test_chunks_are_copied_from_tier_to_tier(make: Make, controller: FakeController) -> None:
    engine = make(Scripted(), Scripted())
    keys = store(engine, 1, 3)
    assert engine.flush(5)
    with engine.owner:
        engine.host.drop(keys)
        engine.tiers.readable[1].delete(keys)
    copy = wire.Copy(id="o1", source="t0", target="t1", keys=joined_keys(keys), kinds=KINDS)
    with joined(engine, controller):
        owe(controller, orders=(copy,))
        assert sorted(wire.split(done(controller, "o1").held)) == sorted(keys)
        controller.until(lambda: {(2, key) for key in keys} <= controller.held)


def test_a_clear_waits_for_no_copy_and_no_copy_brings_back_what_it_cleared(
    make: Make, controller: FakeController
) -> None:
    source, target = Scripted(), Held()
    engine = make(source, target, host_chunks=32)
    keys = engine.keys(prompt(1, 12))
    target.go.set()
    store(engine, 1, 12)
    assert engine.flush(5)
    with engine.owner:
        engine.host.drop(keys)
        engine.tiers.readable[1].delete(keys)
    settled_below = threading.Event()
    with joined(engine, controller):
        controller.until(lambda: len(controller.held) == 12)
        target.reached.clear()
        target.go.clear()
        copy = wire.Copy(id="c", source="t0", target="t1", keys=joined_keys(keys), kinds=KINDS)
        owe(controller, orders=(copy,))
        assert target.reached.wait(5), "a copy is on its way"
        owe(controller, orders=(wire.Clear(id="x", tags=(engine.namespace.tag,)),))
        settled_below.wait(0.1)
        target.go.set()
        assert done(controller, "x").state == "done"
        done(controller, "c")
        settled(engine)
        controller.until(lambda: not controller.held)
        assert not source._values and not target._values


def test_what_can_not_be_done_is_told(make: Make, controller: FakeController) -> None:
    engine = make(Scripted())
    keys = joined_keys(store(engine, 1, 1))
    bad = (
        wire.Copy(id="a", source="t0", target="nowhere", keys=keys, kinds=KINDS),
        wire.Copy(id="b", source="t0", target="host", keys=keys, kinds=()),
        wire.Copy(id="c", source="t0", target="host", keys=b"short", kinds=KINDS),
        wire.Copy(id="d", source="host", target="t0", keys=keys, kinds=KINDS, peer="tcp://x:1"),
        wire.Recode(id="e", tier="t0", codec="none such", keys=keys, kinds=KINDS),
        wire.Pin(id="f", pin="p", tier="nowhere", keys=keys, until_s=time.time() + 9, kinds=KINDS),
    )
    with joined(engine, controller):
        owe(controller, orders=bad)
        for order in bad:
            progress = done(controller, order.id)
            assert progress.state == "failed" and progress.error, order.id


def test_a_cancelled_order_ends(make: Make) -> None:
    store_ = Held()
    engine = make(store_, Scripted())
    pins = Pins(engine, max_bytes=1 << 30)

    def no_peer(address: str) -> RemoteTier:
        raise AssertionError

    orders = Orders(engine, pins, no_peer)
    store(engine, 1, 1)
    until(engine, store_.reached.is_set)
    orders.accept(wire.Clear(id="o1"))
    orders.step()
    orders.cancel("o1")
    assert orders.active, "a put is on its way, behind which it deletes"
    store_.go.set()
    until(engine, lambda: (orders.step(), not orders.active)[1])
    (progress,) = orders.progress()
    assert progress.state == "cancelled"


def test_a_mistake_of_ours_ends_the_order_and_not_the_engine(
    make: Make, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Clearing) -> None:
        raise AssertionError("impossible")

    engine = make(Scripted())
    keys = store(engine, 1, 2)
    assert engine.flush(5)
    with joined(engine, controller):
        monkeypatch.setattr(Clearing, "step", broken)
        owe(controller, orders=(wire.Clear(id="o1"),))
        progress = done(controller, "o1")
        assert progress.state == "failed" and "impossible" in progress.error
        monkeypatch.undo()
        owe(controller, orders=(wire.Clear(id="o2"),))
        assert done(controller, "o2").state == "done"
    assert engine.host.prefix(keys) == 0
    assert engine.metrics.snapshot()["agent.order_broke"] == 1


def test_limits_hold_tenants_to_their_share(make: Make, controller: FakeController) -> None:
    engine = make(host_chunks=32)
    limits = (wire.Limit(engine.namespace.tag, "*", 2 * SLOT_BYTES),)
    with joined(engine, controller):
        owe(controller, limits_version="v1", limits=limits)
        controller.until(lambda: controller.last.limits_version == "v1")
        store(engine, 1, 6)
        controller.until(lambda: len(controller.held) == 2)


# Questions.


def test_questions_are_answered(make: Make, controller: FakeController) -> None:
    row = wire.MissRow(0, bytes(46), "evicted", "host lru", 1.0)
    engine = make()

    def explain(request_id: str) -> list[wire.MissRow] | None:
        return [row] if request_id == "r1" else None

    with joined(engine, controller, tokenize=lambda text: [len(text)], explain=explain):
        ask = wire.Explain
        owe(
            controller,
            questions=(
                wire.Tokenize(id="q1", text="abc"),
                ask(id="q2", request_id="r1"),
                ask(id="q3", request_id="other"),
            ),
        )
        controller.until(lambda: {"q1", "q2", "q3"} <= set(controller.answers))
    assert controller.answers["q1"].tokens == [3]
    assert controller.answers["q2"].misses == [row] and controller.answers["q2"].found
    assert not controller.answers["q3"].found


def test_a_tokenizer_that_fails_is_told(make: Make, controller: FakeController) -> None:
    def broken(text: str) -> list[int]:
        raise RuntimeError("no vocabulary")

    engine = make()
    with joined(engine, controller, tokenize=broken):
        owe(controller, questions=(wire.Tokenize(id="q1", text="abc"),))
        controller.until(lambda: "q1" in controller.answers)
        assert "no vocabulary" in controller.answers["q1"].error


# When they are away.


def test_without_a_controller_an_engine_does_its_work(make: Make) -> None:
    controller = FakeController()
    controller.close()
    engine = make(Scripted())
    with joined(engine, controller) as agent:
        keys = store(engine, 1, 3)
        settled(engine)
        assert engine.host.prefix(keys) == 3
        start_s = time.monotonic()
        assert agent.close() and time.monotonic() - start_s < 2


def test_a_frozen_controller_holds_up_nobody(make: Make, controller: FakeController) -> None:
    engine = make(Scripted())
    with joined(engine, controller) as agent:
        controller.until(lambda: bool(controller.syncs))
        controller.thawed.clear()
        keys = store(engine, 1, 3)
        settled(engine)
        assert engine.host.prefix(keys) == 3
        start_s = time.monotonic()
        agent.close()
        assert time.monotonic() - start_s < 2.5


def test_a_wrong_token_is_refused_and_tried_again_slowly(
    make: Make, controller: FakeController
) -> None:
    engine = make()
    with joined(engine, controller, token="another-token-altogether"):
        end_s = time.monotonic() + 5
        while not engine.metrics.snapshot().get("agent.sync_failed"):
            assert time.monotonic() < end_s
            time.sleep(0.01)
    assert controller.refused and not controller.syncs


def test_it_finds_its_controller_again(make: Make) -> None:
    first = FakeController()
    engine = make(Scripted())
    with joined(engine, first):
        first.until(lambda: bool(first.syncs))
        first.close()
        store(engine, 1, 2)
        second = FakeController(first.port)
        try:
            second.until(lambda: second.held == truth(engine) and len(second.held) == 4)
        finally:
            second.close()
