"""Eviction order: oldest leaf first, never an orphaned suffix."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_core.policy.lru import Lru
from lmcache_core.sdk.errors import ContractViolation


def chain(lru: Lru, *keys: bytes) -> None:
    for parent, key in zip((None, *keys), keys, strict=False):
        lru.add(key, parent)


def evict_all(lru: Lru, pinned: frozenset[bytes] = frozenset()) -> list[bytes]:
    gone = []
    for key in lru.victims(lambda key: key not in pinned):
        lru.remove(key)
        gone.append(key)
    return gone


def test_a_chain_goes_from_its_tail() -> None:
    lru = Lru()
    chain(lru, b"a", b"b", b"c")
    assert evict_all(lru) == [b"c", b"b", b"a"]
    assert len(lru) == 0


def test_the_oldest_leaf_goes_first() -> None:
    lru = Lru()
    chain(lru, b"a")
    chain(lru, b"x")
    lru.touch([b"a"])
    assert evict_all(lru) == [b"x", b"a"]


def test_a_shared_head_keeps_its_own_age() -> None:
    lru = Lru()
    chain(lru, b"head", b"old")
    chain(lru, b"other")
    lru.touch([b"head"])
    assert evict_all(lru) == [b"old", b"other", b"head"]


def test_adding_again_is_a_touch() -> None:
    lru = Lru()
    chain(lru, b"a")
    chain(lru, b"x")
    lru.add(b"a", None)
    assert len(lru) == 2
    assert evict_all(lru) == [b"x", b"a"]


def test_a_touched_prefix_has_ancestors_more_recent() -> None:
    lru = Lru()
    for key in (b"a", b"b", b"c"):
        lru.add(key, None)
    lru.touch([b"a", b"b", b"c"])
    assert evict_all(lru) == [b"c", b"b", b"a"]


def test_a_pinned_leaf_protects_its_ancestors_and_can_go_later() -> None:
    lru = Lru()
    chain(lru, b"a", b"b", b"c")
    assert evict_all(lru, frozenset({b"c"})) == []
    assert evict_all(lru) == [b"c", b"b", b"a"]


def test_a_victim_that_stays_protects_its_parent() -> None:
    lru = Lru()
    chain(lru, b"a", b"b")
    assert list(lru.victims(lambda key: True)) == [b"b"]
    assert list(lru.victims(lambda key: True)) == [b"b"]


def test_a_closed_iterator_loses_nothing() -> None:
    lru = Lru()
    chain(lru, b"a")
    chain(lru, b"b")
    victims = lru.victims(lambda key: True)
    assert next(victims) == b"a"
    victims.close()
    assert evict_all(lru) == [b"a", b"b"]


def test_a_parent_that_comes_back_is_protected_again() -> None:
    lru = Lru()
    chain(lru, b"a", b"b")
    lru.remove(b"a")
    lru.add(b"a", None)
    assert evict_all(lru) == [b"b", b"a"]


def test_absent_keys_are_ignored_and_own_parents_refused() -> None:
    lru = Lru()
    lru.remove(b"a")
    lru.touch([b"a"])
    assert b"a" not in lru
    with pytest.raises(ContractViolation):
        lru.add(b"a", b"a")


KEYS = [bytes([n]) for n in range(12)]


def parent_of(key: bytes) -> bytes | None:
    return None if key[0] == 0 else bytes([(key[0] - 1) // 2])


class Machine(RuleBasedStateMachine):
    """Keys of a binary tree; the model is a plain list in order of recency."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = Lru()
        self.order: list[bytes] = []
        self.removed: set[bytes] = set()
        self.guarded: set[bytes] = set()

    def _touch(self, key: bytes) -> None:
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    @rule(key=st.sampled_from(KEYS))
    def add(self, key: bytes) -> None:
        parent = parent_of(key)
        self.lru.add(key, parent)
        if key not in self.order:
            self.order.append(key)
        self._touch(key)
        self.removed.discard(key)
        if parent in self.order:
            self.guarded.add(key)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def touch(self, keys: list[bytes]) -> None:
        self.lru.touch(keys)
        for key in reversed(keys):
            self._touch(key)

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        self.lru.remove(key)
        if key in self.order:
            self.order.remove(key)
            self.guarded.discard(key)
            self.removed.add(key)

    @rule(count=st.integers(0, 6), pinned=st.frozensets(st.sampled_from(KEYS), max_size=4))
    def evict(self, count: int, pinned: frozenset[bytes]) -> None:
        victims = self.lru.victims(lambda key: key not in pinned)
        for _ in range(count):
            parents = {parent_of(key) for key in self.order}
            free = [key for key in self.order if key not in parents and key not in pinned]
            found = next(victims, None)
            assert found == (free[0] if free else None)
            if found is None:
                break
            self.lru.remove(found)
            self.order.remove(found)
            self.guarded.discard(found)
        victims.close()

    @invariant()
    def no_suffix_is_orphaned(self) -> None:
        assert len(self.lru) == len(self.order)
        assert all((key in self.lru) == (key in self.order) for key in KEYS)
        for key in self.guarded:
            parent = parent_of(key)
            assert parent in self.lru or parent in self.removed


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
