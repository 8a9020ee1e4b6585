"""The choice of engines, without any."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy_rig import Clock

from lmcache_core.proxy.config import Engine
from lmcache_core.proxy.pool import Lease, Outcome, Pool
from lmcache_core.proxy.request import Asked, Refusal

RETRY_S = 2.0
ENGINES = [Engine(f"http://e{number}") for number in range(3)]


def pool_of(count: int) -> tuple[Pool, Clock]:
    clock = Clock()
    return Pool(ENGINES[:count], retry_s=RETRY_S, now_s=clock), clock


def pick(pool: Pool, size: int = 10, **wish: Any) -> Lease:
    lease = pool.pick(size, **wish)
    assert lease is not None
    return lease


def test_equals_take_turns() -> None:
    pool, _ = pool_of(3)
    chosen = []
    for _ in range(6):
        lease = pick(pool)
        chosen.append(lease.engine)
        pool.end(lease, Outcome.DONE)
    assert chosen == ENGINES * 2


def test_a_long_prompt_weighs_more_than_many_short_ones() -> None:
    pool, _ = pool_of(2)
    pick(pool, 100_000)
    assert [pick(pool, 10).engine for _ in range(8)] == [ENGINES[1]] * 8


def test_a_failed_engine_is_tried_by_one_request_and_then_by_all() -> None:
    pool, clock = pool_of(1)
    pool.end(pick(pool), Outcome.FAILED)
    assert pool.pick(10) is None
    clock.now_s += RETRY_S
    trial = pick(pool)
    assert trial.trial and pool.pick(10) is None
    pool.answered(trial)
    assert not pick(pool).trial, "it need not have ended"
    pool.end(trial, Outcome.DONE)


def test_a_request_from_before_the_failure_does_not_end_the_trial() -> None:
    pool, clock = pool_of(1)
    before = pick(pool)
    pool.end(pick(pool), Outcome.FAILED)
    clock.now_s += RETRY_S
    assert pick(pool).trial
    pool.end(before, Outcome.CANCELLED)
    assert pool.pick(10) is None


def test_a_failed_trial_takes_as_long_again() -> None:
    pool, clock = pool_of(1)
    pool.end(pick(pool), Outcome.FAILED)
    clock.now_s += RETRY_S
    pool.end(pick(pool), Outcome.FAILED)
    clock.now_s += RETRY_S - 0.1
    assert pool.pick(10) is None
    clock.now_s += 0.1
    trial = pick(pool)
    pool.end(trial, Outcome.CANCELLED)
    assert pick(pool).trial, "one that was cancelled says nothing"


def test_late_is_no_fault_until_it_is_the_rule() -> None:
    pool, _ = pool_of(1)
    for outcome in (Outcome.LATE, Outcome.LATE, Outcome.DONE, Outcome.LATE, Outcome.LATE):
        pool.end(pick(pool), outcome)
    pool.end(pick(pool), Outcome.LATE)
    assert pool.pick(10) is None


def test_a_request_ends_once() -> None:
    pool, _ = pool_of(1)
    lease = pick(pool)
    pool.end(lease, Outcome.DONE)
    with pytest.raises(ValueError, match="ended before"):
        pool.end(lease, Outcome.DONE)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pick"), st.integers(0, 100_000), st.booleans()),
        st.tuples(st.just("end"), st.integers(0, 1000), st.sampled_from(Outcome)),
        st.tuples(st.just("pass"), st.integers(1, 30), st.just(None)),
    ),
    max_size=80,
)


@given(st.integers(1, 3), STEPS)
def test_no_engine_that_failed_is_taken_while_another_is_well(
    count: int, steps: list[tuple[Any, ...]]
) -> None:
    pool, clock = pool_of(count)
    leases: list[Lease] = []
    for kind, number, choice in steps:
        healthy = {state.engine for state in pool.states() if state.healthy}
        if kind == "pick":
            lease = pool.pick(number, at_any_cost=choice)
            if lease is not None:
                assert lease.engine in healthy or (choice and not healthy)
                leases.append(lease)
            else:
                assert not healthy and not choice
        elif kind == "end" and leases:
            pool.end(leases.pop(number % len(leases)), choice)
        elif kind == "pass":
            clock.now_s += number / 10
        assert sum(state.in_flight for state in pool.states()) == len(leases)
    for lease in leases:
        pool.end(lease, Outcome.DONE)
    assert [state.in_flight for state in pool.states()] == [0] * count
    clock.now_s += RETRY_S
    assert all(state.healthy for state in pool.states()), "each gets its trial"
    turns = [pick(pool) for _ in range(count)]
    assert {lease.engine for lease in turns} == set(ENGINES[:count]), "no load was left behind"


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9)),
    st.sampled_from(["", " ", "\n\t"]),
)
def test_the_decoder_gets_what_the_client_said(fields: dict[str, Any], space: str) -> None:
    asked = Asked.parse("/v1/completions", (space + json.dumps(fields) + space).encode())
    params = {"lmcache": {"role": "decode", "transfer_id": "id"}}
    assert json.loads(asked.for_decoder("id")) == {**fields, "kv_transfer_params": params}
    assert asked.for_decoder("") == asked.body


@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes) -> None:
    try:
        asked = Asked.parse("/v1/completions", body)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert json.loads(asked.for_prefiller("id", "tcp://d:1"))["max_tokens"] == 1
