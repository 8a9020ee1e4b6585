"""Who holds what: as a naive model has it, within its limits, and in turns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.controller.directory import SLICE, Directory, Run, TooManyChunks

KEYS = [bytes([65 + n]) * 8 + bytes(38) for n in range(6)]
TIERS = 3


def directory(**limits: int) -> Directory:
    return Directory(**{"max_chunks": 1000, "max_chunks_per_instance": 1000, **limits})


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def many(count: int, start: int = 0) -> list[bytes]:
    return [number.to_bytes(46, "big") for number in range(start, start + count)]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "clear", "leave"]),
        st.integers(0, 11),
        st.integers(0, TIERS - 1),
        st.lists(st.sampled_from(KEYS), max_size=6),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True))
def test_it_is_what_a_naive_model_is(
    steps: list[tuple[str, int, int, list[bytes]]], asked: list[bytes]
) -> None:
    real = directory()
    slots: dict[int, int] = {}
    model: dict[int, dict[int, set[bytes]]] = {}

    async def play() -> None:
        for op, who, tier, keys in steps:
            if who not in slots:
                slots[who] = real.join()
                model[who] = {number: set() for number in range(TIERS)}
            if op == "add":
                await real.add(slots[who], tier, keys)
                model[who][tier].update(keys)
            elif op == "remove":
                await real.remove(slots[who], tier, keys)
                model[who][tier].difference_update(keys)
            elif op == "clear":
                await real.clear(slots[who])
                model[who] = {number: set() for number in range(TIERS)}
            else:
                await real.leave(slots.pop(who))
                del model[who]

    run(play())
    expected = []
    for who, tiers in model.items():
        held = [[key in tiers[n] for n in range(TIERS)] for key in asked]
        length = next((i for i, row in enumerate(held) if not any(row)), len(held))
        if length:
            counts = [sum(row[n] for row in held[:length]) for n in range(TIERS)]
            expected.append(Run(slots[who], length, (*counts, *[0] * (8 - TIERS))))
        for n in range(TIERS):
            assert real.chunks(slots[who], n) == len(tiers[n])
            assert real.among(slots[who], n, KEYS) == [k for k in KEYS if k in tiers[n]]
            tags = {KEYS[0][:8], KEYS[3][:8]}
            found = run(real.of_tags(slots[who], n, tags))
            assert sorted(found) == sorted(k for k in tiers[n] if k[:8] in tags)
        assert real.chunks(slots[who]) == len(set().union(*tiers.values()))
    assert real.prefix(asked) == sorted(expected, key=lambda r: (-r.chunks, r.slot))
    assert len(real) == len(set().union(*(held for t in model.values() for held in t.values())))
    holders = real.holders(asked, slots.values(), 0)
    for key, found in zip(asked, holders):
        assert set(found) == {slots[who] for who in model if key in model[who][0]}


def test_a_prefix_longer_than_a_block_is_counted_whole() -> None:
    keys = many(5000)
    real = directory(max_chunks=10_000, max_chunks_per_instance=10_000)
    one, other = real.join(), real.join()

    async def fill() -> None:
        await real.add(one, 0, keys)
        await real.add(other, 1, keys[:1024])
        await real.add(other, 1, keys[1025:])

    run(fill())
    assert real.prefix(keys) == [
        Run(one, 5000, (5000, 0, 0, 0, 0, 0, 0, 0)),
        Run(other, 1024, (0, 1024, 0, 0, 0, 0, 0, 0)),
    ]
    assert real.prefix(many(3, 9000)) == [] and real.prefix([]) == []


def test_its_limits_are_kept_exactly() -> None:
    real = directory(max_chunks=10, max_chunks_per_instance=6)
    one, other = real.join(), real.join()

    async def fill() -> None:
        await real.add(one, 0, many(6))
        await real.add(one, 1, many(6))  # the same chunks, in another tier
        with pytest.raises(TooManyChunks, match="6 chunks of one instance"):
            await real.add(one, 0, many(1, 6))
        await real.add(other, 0, many(4))  # somebody has them already
        await real.add(other, 0, many(2, 100))
        await real.clear(other)
        await real.add(other, 0, many(4, 100))
        with pytest.raises(TooManyChunks, match="10 chunks of all"):
            await real.add(other, 0, many(2, 200))

    run(fill())
    assert len(real) == 10 and real.chunks(one) == 6


def test_others_get_turns_while_much_is_handled() -> None:
    real = directory(max_chunks=10**6, max_chunks_per_instance=10**6)
    slot = real.join()
    keys = many(10 * SLICE)

    async def turns_of(work: Coroutine[Any, Any, Any]) -> int:
        turns = 0
        task = asyncio.create_task(work)
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    async def play() -> list[int]:
        return [
            await turns_of(work)
            for work in (
                real.add(slot, 0, keys), real.of_tags(slot, 0, None),
                real.remove(slot, 0, keys[: SLICE * 5]), real.clear(slot),
            )
        ]  # fmt: skip

    added, listed, removed, cleared = run(play())
    assert min(added, listed) >= 9 and removed >= 4 and cleared >= 4
    assert len(real) == 0


def test_a_slot_is_used_again_and_has_nothing_of_before() -> None:
    real = directory()
    first, second = real.join(), real.join()

    async def play() -> int:
        await real.add(first, 0, KEYS[:2])
        await real.add(second, 0, KEYS[:1])
        await real.leave(first)
        return real.join()

    assert run(play()) == first
    assert real.chunks(first) == 0
    assert [found.slot for found in real.prefix(KEYS[:2])] == [second]
