"""Shares: a namespace with a limit pays for what it stores with its own oldest chunks."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from scripted import SLOT_BYTES, TIER, Make, Pages, Scripted, make, prompt, until
from test_clearing import put_other

from lmcache_core.engine import CacheEngine
from lmcache_core.keys import Namespace
from lmcache_core.policy.shares import Shares

__all__ = ["make"]
A, B = b"tenant-a", b"tenant-b"


def key(tag: bytes, number: int) -> bytes:
    return tag + number.to_bytes(38, "little")


def settle(engine: CacheEngine) -> None:
    assert engine.flush(5)
    until(engine, lambda: not engine.host.over_share)
    for _ in range(20):
        engine.poll()
        engine.runtime.wait(0.01)


def test_a_tenant_over_its_share_of_host_loses_its_own_oldest(make: Make) -> None:
    engine = make(host_chunks=32)
    tag = engine.namespace.tag
    others = put_other(engine, 9, 4)
    engine.host.limit_shares({tag: 4 * SLOT_BYTES})
    for seed in (1, 2, 3):
        engine.store(prompt(seed, 2), Pages(seed))
    settle(engine)
    resident = [engine.host.prefix(engine.keys(prompt(seed, 2))) for seed in (1, 2, 3)]
    assert resident == [0, 2, 2]
    assert engine.host.prefix(others) == 4
    assert engine.evicted.get(engine.keys(prompt(1, 2))[0]).policy == "quota"  # type: ignore[union-attr]


def test_a_prefix_longer_than_the_share_keeps_its_head(make: Make) -> None:
    engine = make(host_chunks=32)
    engine.host.limit_shares({engine.namespace.tag: 3 * SLOT_BYTES})
    engine.store(prompt(1, 8), Pages(1))
    settle(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 8))) == 3


def test_a_limit_that_comes_later_holds_for_what_is_there(make: Make) -> None:
    engine = make(host_chunks=32)
    for seed in (1, 2, 3):
        engine.store(prompt(seed, 2), Pages(seed))
    engine.retrieve(prompt(1, 2), Pages(1))  # the first is the latest used
    engine.host.limit_shares({engine.namespace.tag: 4 * SLOT_BYTES})
    settle(engine)
    resident = [engine.host.prefix(engine.keys(prompt(seed, 2))) for seed in (1, 2, 3)]
    assert resident == [2, 0, 2]
    engine.host.limit_shares({})
    engine.store(prompt(4, 4), Pages(4))
    settle(engine)
    assert engine.host.prefix(engine.keys(prompt(4, 4))) == 4


def test_pinned_chunks_stay_over_the_share(make: Make) -> None:
    engine = make(host_chunks=32)
    engine.store(prompt(1, 3), Pages(1))
    assert engine.pin(prompt(1, 3))
    engine.host.limit_shares({engine.namespace.tag: SLOT_BYTES})
    engine.poll()
    assert engine.host.prefix(engine.keys(prompt(1, 3))) == 3
    engine.unpin(prompt(1, 3))
    settle(engine)
    assert engine.host.prefix(engine.keys(prompt(1, 3))) == 1


def test_a_share_of_a_store(make: Make) -> None:
    store = Scripted()
    engine = make(store, host_chunks=32)
    tier = engine.tiers.readable[0]
    tier.limit_shares({engine.namespace.tag: 4 * SLOT_BYTES})
    others = put_other(engine, 9, 4)
    for seed in (1, 2, 3, 4):
        engine.store(prompt(seed, 2), Pages(seed))
        settle(engine)
    kept = [set(engine.keys(prompt(seed, 2))) <= set(store._values) for seed in (1, 2, 3, 4)]
    assert kept == [False, False, True, True]
    assert set(others) <= set(store._values)
    taken = {one.tag: (one.chunks, one.nbytes) for one in tier.shares(10)}
    assert taken[engine.namespace.tag] == (4, 4 * SLOT_BYTES)


def test_what_each_namespace_takes_is_counted(make: Make) -> None:
    store = Scripted()
    engine = make(store, host_chunks=32, tier=msgspec.structs.replace(TIER, size_bytes=1 << 30))
    put_other(engine, 9, 3)
    engine.store(prompt(1, 2), Pages(1))
    assert engine.flush(5)
    other = Namespace.of({"model": "another"}).tag
    for shares in (engine.host.shares(9), engine.tiers.readable[0].shares(9)):
        assert [(one.tag, one.chunks, one.nbytes) for one in shares] == [
            (other, 3, 3 * SLOT_BYTES),
            (engine.namespace.tag, 2, 2 * SLOT_BYTES),
        ]
    engine.drop(engine.keys(prompt(1, 2)))
    until(engine, lambda: len(store._values) == 3)
    until(engine, lambda: len(engine.tiers.readable[0].shares(9)) == 1)
    assert [one.tag for one in engine.host.shares(9)] == [other]


def test_many_new_limits_look_through_what_is_there_once() -> None:
    tags = [b"%08d" % number for number in range(50)]
    rows = [(key(tag, number), None) for number in range(3) for tag in tags]
    looked: list[int] = []

    def resident() -> list[tuple[bytes, None]]:
        looked.append(1)
        return rows

    shares = Shares()
    shares.limit({tag: 10 for tag in tags}, resident)
    assert len(looked) == 1
    for tag in tags:
        assert list(shares.victims(tag, lambda one: True)) == [key(tag, n) for n in range(3)]
    shares.limit({tag: 20 for tag in tags[:9]}, resident)
    assert len(looked) == 1, "no tag is new"
    assert list(shares.victims(tags[0], lambda one: True)) == [key(tags[0], n) for n in range(3)]


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B]), st.integers(0, 5), st.integers(1, 100)), max_size=60
    ),
    st.integers(0, 300),
)
def test_victims_of_one_tenant_are_its_own_oldest_and_enough(
    steps: list[tuple[bytes, int, int]], limit: int
) -> None:
    shares = Shares()
    shares.limit({A: limit}, lambda: [])
    sizes: dict[bytes, int] = {}
    used: list[bytes] = []
    for tag, number, nbytes in steps:
        one = key(tag, number)
        if one in sizes:
            shares.touch([one])
        else:
            sizes[one] = nbytes
            shares.count(one, nbytes, 1)
            shares.add(one, None)
        used = [each for each in used if each != one] + [one]
        for over in shares.take_over():
            assert over == A
            candidates = shares.victims(A, lambda key: True)
            while shares.surplus(A) > 0:
                victim = next(candidates)
                assert victim == next(each for each in used if each.startswith(A))
                shares.remove(victim)
                shares.count(victim, -sizes.pop(victim), -1)
                used.remove(victim)
            candidates.close()
        assert sum(size for each, size in sizes.items() if each.startswith(A)) <= limit
    expected = {
        tag: (len(mine), sum(mine))
        for tag in (A, B)
        if (mine := [size for each, size in sizes.items() if each.startswith(tag)])
    }
    assert {one.tag: (one.chunks, one.nbytes) for one in shares.largest(9)} == expected
