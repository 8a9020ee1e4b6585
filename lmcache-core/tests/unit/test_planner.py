"""The plan of a load, against the plainest reading of its definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_core import planner


def plan(residency: list[list[bool]]) -> list[int]:
    """Of tiers that have all answered."""
    tiers, decided = planner.plan(residency)
    assert decided
    return tiers


residencies = st.tuples(st.integers(1, 5), st.integers(0, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.sampled_from([True, True, False]), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


def by_brute_force(residency: list[list[bool]]) -> list[int]:
    """Every prefix length from the longest down, every tier from the fastest on."""
    tiers, chunks = range(len(residency)), len(residency[0])
    for length in range(chunks, -1, -1):
        holders = [[t for t in tiers if residency[t][i]] for i in range(length)]
        if all(holders):
            return [min(found) for found in holders]
    raise AssertionError("the empty prefix is always held")


@given(residencies)
def test_plan_is_the_longest_held_prefix_from_the_fastest_tiers(
    residency: list[list[bool]],
) -> None:
    assert plan(residency) == by_brute_force(residency)


@given(residencies)
def test_what_lies_behind_the_first_hole_changes_nothing(residency: list[list[bool]]) -> None:
    length = len(plan(residency))
    changed = [row[: length + 1] + [not held for held in row[length + 1 :]] for row in residency]
    assert plan(changed) == plan(residency)


@given(residencies)
def test_a_further_slower_tier_never_changes_what_was_planned(residency: list[list[bool]]) -> None:
    before = plan(residency)
    full = [True] * len(residency[0])
    assert plan([*residency, full])[: len(before)] == before
    assert len(plan([*residency, full])) == len(full)


@pytest.mark.parametrize("residency", [[], [[]], [[], []], [[False]], [[False, True]]])
def test_nothing_held_at_the_start_is_an_empty_plan(residency: list[list[bool]]) -> None:
    assert plan(residency) == []


def test_each_chunk_comes_from_the_fastest_tier_that_holds_it() -> None:
    assert plan([[True, False, False, True], [True, True, False, True]]) == [0, 1]
    assert plan(((True, False, True), (False, True, True))) == [0, 1, 0]


@given(residencies, st.data())
def test_answers_that_are_still_to_come_only_make_the_prefix_longer(
    residency: list[list[bool]], data: st.DataObject
) -> None:
    late = data.draw(st.sets(st.integers(0, len(residency) - 1)))
    partial = [None if tier in late else row for tier, row in enumerate(residency)]
    tiers, decided = planner.plan(partial)
    assert len(tiers) <= len(plan(residency))
    assert all(residency[tier][i] for i, tier in enumerate(tiers))
    if decided:
        assert len(tiers) == len(plan(residency))


def test_a_prefix_that_one_tier_has_whole_is_decided_without_the_others() -> None:
    assert planner.plan([[True, True], None]) == ([0, 0], True)
    assert planner.plan([[True, False], None]) == ([0], False)
    assert planner.plan([None, None]) == ([], False)
