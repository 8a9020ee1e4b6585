"""What an instance tells its controllers: exactly what is here, each in its own time."""

from __future__ import annotations

import random

import pytest
from agent_rig import FakeController, controller, joined, settled, store, truth
from scripted import SLOT_BYTES, Make, Scripted, make, prompt

from lmcache_core.agent import agent as agent_module
from lmcache_core.agent import changes as changes_module
from lmcache_core.agent import wire

__all__ = ["controller", "make"]


def test_everything_that_was_there_before_is_told(make: Make, controller: FakeController) -> None:
    engine = make(Scripted())
    store(engine, 1, 3)
    assert engine.flush(5)
    with joined(engine, controller):
        controller.until(lambda: controller.held == truth(engine))
    first = controller.syncs[0]
    assert first.reset and first.instance == "e1" and first.version == wire.VERSION


def test_a_random_life_is_followed_exactly(make: Make, controller: FakeController) -> None:
    engine = make(Scripted(), Scripted(), host_chunks=10)
    rng = random.Random(4)
    with joined(engine, controller):
        for _ in range(60):
            seed = rng.randrange(6)
            if rng.random() < 0.7:
                store(engine, seed, rng.randrange(1, 4))
            else:
                with engine.owner:
                    engine.drop(engine.keys(prompt(seed, 3)))
            if rng.random() < 0.1:
                controller.ask_again = True
            if rng.random() < 0.1:
                controller.restart()
        settled(engine)
        controller.until(lambda: controller.held == truth(engine))


def test_lost_answers_cost_nothing_but_a_second_telling(
    make: Make, controller: FakeController
) -> None:
    engine = make(Scripted())
    with joined(engine, controller):
        controller.until(lambda: bool(controller.syncs))
        controller.lose = True
        store(engine, 1, 2)
        controller.until(lambda: len(controller.syncs) >= 3)
        controller.lose = False
        controller.until(lambda: controller.held == truth(engine) and len(controller.held) == 4)


def test_who_is_too_far_behind_is_told_all(
    make: Make, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "MAX_KEPT", 4)
    engine = make(Scripted(), host_chunks=64)
    with joined(engine, controller):
        controller.until(lambda: bool(controller.syncs))
        controller.thawed.clear()
        store(engine, 1, 20)
        settled(engine)
        controller.thawed.set()
        controller.until(lambda: controller.held == truth(engine) and len(controller.held) == 40)
    assert sum(sync.reset for sync in controller.syncs) >= 2


def test_much_is_told_in_pieces(
    make: Make, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes_module, "KEYS_A_PIECE", 3)
    engine = make(host_chunks=64)
    store(engine, 1, 20)
    with joined(engine, controller):
        controller.until(lambda: controller.held == truth(engine))
    pieces = [sync for sync in controller.syncs if sync.changes]
    assert len(pieces) == 7 and [sync.more for sync in pieces] == [True] * 6 + [False]
    assert [sync.reset for sync in pieces] == [True] + [False] * 6


def test_the_status_names_tiers_counters_and_shares(make: Make, controller: FakeController) -> None:
    engine = make(Scripted())
    keys = store(engine, 1, 2)
    with joined(engine, controller, channel="tcp://127.0.0.1:1", urls={"t0": "test://"}) as agent:
        agent.saved(keys[0], 512, 2)
        agent.saved(keys[0], 256, 1)

        def known() -> bool:
            status = controller.last.status
            return status is not None and bool(status.top) and len(status.tiers[1].shares) == 1

        controller.until(known)
    status = controller.last.status
    assert status is not None and status.channel == "tcp://127.0.0.1:1"
    assert [tier.name for tier in status.tiers] == ["host", "t0"]
    assert status.tiers[0].shares == (wire.Share(engine.namespace.tag, 2, 2 * SLOT_BYTES),)
    assert status.tiers[1].url == "test://" and status.counters["host.stored"] == 2
    assert status.top == (wire.TopPrefix(keys[0], 768, 2, 2),)


def test_namespaces_are_told_once_and_again_to_a_new_controller(
    make: Make, controller: FakeController
) -> None:
    engine = make()
    note = wire.NamespaceNote(b"12345678", engine.namespace.tag, wire.tenant_id("salt"), "")
    with joined(engine, controller) as agent:
        agent.saw_namespace(note)
        agent.saw_namespace(note)
        controller.until(lambda: controller.namespaces == {note.tag: note})
        told = [sync for sync in controller.syncs if sync.namespaces]
        assert len(told) == 1
        controller.restart()
        controller.namespaces = {}
        controller.until(lambda: controller.namespaces == {note.tag: note})


def test_new_namespaces_are_told_when_the_oldest_are_forgotten(
    make: Make, controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "MAX_NAMESPACES", 2)
    engine = make()
    with joined(engine, controller) as agent:
        for number in range(6):
            note = wire.NamespaceNote(b"%08d" % number, engine.namespace.tag)
            agent.saw_namespace(note)
            controller.until(lambda: note.tag in controller.namespaces)  # noqa: B023
        controller.restart()
        controller.namespaces = {}
        controller.until(lambda: sorted(controller.namespaces) == [b"00000004", b"00000005"])


def test_two_controllers_are_told_alike_and_one_may_be_away(make: Make) -> None:
    first, second = FakeController(), FakeController()
    second.down = True
    engine = make(Scripted())
    try:
        with joined(engine, first, second):
            store(engine, 1, 3)
            first.until(lambda: len(first.held) == 6)
            second.down = False
            second.until(lambda: second.held == first.held)
    finally:
        first.close()
        second.close()
