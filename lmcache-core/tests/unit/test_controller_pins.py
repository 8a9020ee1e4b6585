"""Pins, explanations of misses, and the same request twice."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from controller_ops import (
    KEYS,
    SELECT,
    SERVED,
    ask,
    asked,
    greeted,
    pins,
)
from controller_rig import (
    rig,
)

from lmcache_core.agent import wire
from lmcache_core.controller import messages

# Pins.


def test_a_pin_is_carried_out_where_the_prefix_is() -> None:
    with rig() as made:
        instance = greeted(made)
        greeted(made, "other")
        instance.stores("host", KEYS[:2])
        pin = ask(made, "pins", owner="me", ttl_s=60)
        assert (pin.instances, pin.chunks, pin.owner) == (["i0"], 3, "me")
        (order,) = instance.take()
        assert isinstance(order, wire.Pin)
        assert (order.pin, order.tier, order.until_s) == (pin.id, "host", pin.until_s)
        assert wire.split(order.keys) == KEYS and order.kinds == SERVED.kinds
        instance.ends(order, held=order.keys, total=3, settled=3)
        assert made.job(pin.job).state == "done" and made.job(pin.job).pin == pin.id
        assert pins(made) == [pin]
        made.clock.now_s += 61
        assert pins(made) == []


def test_a_pin_lasts_over_processes_until_it_is_ended() -> None:
    with rig() as made:
        instance = greeted(made)
        pin = ask(made, "pins", owner="me", ttl_s=1000, instances=["i0"])
        (order,) = instance.take()
        instance.ends(order)
        instance.sync()
        assert instance.take(0.0) == [], "once a process"
        made.clock.now_s += 5
        instance.restarts()
        (again,) = instance.take()
        assert isinstance(again, wire.Pin) and again.pin == pin.id and again.id != order.id
        assert again.until_s == pin.until_s
        instance.ends(again)
        assert instance.recorded[-1] == again.id
        made.clock.now_s += 5
        assert instance.take(0.0) == []
        ending = made.client.delete(f"/v1/pins/{pin.id}")
        assert ending.status_code == 202 and ending.json()["kind"] == "unpin"
        assert pins(made) == []
        (unpin,) = instance.take()
        assert isinstance(unpin, wire.Unpin) and unpin.pin == pin.id
        instance.ends(unpin)
        made.clock.now_s += 5
        instance.restarts()
        assert instance.take(0.0) == []
        assert made.client.delete(f"/v1/pins/{pin.id}").status_code == 404


def test_a_pin_reaches_one_that_was_lost_meanwhile() -> None:
    with rig(lease_s=10) as made:
        instance = greeted(made)
        pin = ask(made, "pins", owner="me", ttl_s=1000, instances=["i0"])
        made.clock.now_s += 11
        assert made.job(pin.job, wait_s=10).state == "failed"
        (order,) = instance.take()
        assert isinstance(order, wire.Pin) and order.pin == pin.id


def test_ending_a_pin_that_is_being_made_stops_that() -> None:
    with rig() as made:
        instance = greeted(made)
        pin = ask(made, "pins", owner="me", ttl_s=1000, instances=["i0"])
        (order,) = instance.take()
        instance.sync(progress=(wire.Progress(id=order.id, state="running"),))
        made.client.delete(f"/v1/pins/{pin.id}")
        (unpin,) = instance.take()
        assert isinstance(unpin, wire.Unpin) and instance.cancelled == [order.id]


def test_pins_have_quotas() -> None:
    with rig(max_pins=3, max_pinned_bytes_per_owner=7000) as made:
        greeted(made)
        body = {"ttl_s": 60, "instances": ["i0"]}
        for _ in range(2):  # 3 chunks of 1000 bytes each
            ask(made, "pins", owner="me", **body)
        assert ask(made, "pins", owner="me", status=409, **body).code == "quota"
        ask(made, "pins", owner="you", **body)
        problem = ask(made, "pins", owner="he", status=409, **body)
        assert problem.code == "too_many_pins" and "--max-pins" in problem.hint
        made.clock.now_s += 61
        ask(made, "pins", owner="me", **body)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 409, "nobody_has_it"),
        ({"instances": ["no"]}, 404, "not_found"),
        ({"instances": ["i0"], "tier": "tape"}, 404, "not_found"),
        ({"instances": ["i0"], "select": {"model": "m"}}, 422, "nothing_to_pin"),
        ({"instances": ["i0"], "select": {"tokens": [1], "model": "m"}}, 422, "nothing_to_pin"),
        ({"instances": ["i0"], "ttl_s": 0}, 422, "invalid"),
        ({"instances": ["i0"], "ttl_s": 1e9}, 422, "invalid"),
        ({"instances": ["i0"], "owner": "no owner"}, 422, "invalid"),
    ],
)
def test_a_pin_that_can_not_be_is_refused(body: dict[str, Any], status: int, code: str) -> None:
    with rig() as made:
        greeted(made)
        given = {"owner": "me", "ttl_s": 60, **body}
        assert ask(made, "pins", status=status, **given).code == code
        assert pins(made) == []


# Misses.


def test_misses_are_asked_of_all_and_told_by_who_knows() -> None:
    with rig() as made:
        one, other = greeted(made, "one"), greeted(made, "other")
        greeted(made, "node", kind="node", models=())
        row = wire.MissRow(0, KEYS[0], "evicted", "host lru", 12.5)
        seen: list[Any] = []
        asking = threading.Thread(
            target=lambda: seen.append(made.get("/v1/misses/req/7", messages.Misses))
        )
        asking.start()
        for instance, found in ((one, False), (other, True)):
            question = asked(instance)
            assert isinstance(question, wire.Explain) and question.request_id == "req/7"
            rows = [row] if found else []
            instance.sync(answers=(wire.Answer(id=question.id, found=found, misses=rows),))
        asking.join(10)
        assert seen[0].instance == "other"
        assert seen[0].misses == [
            messages.Miss(
                index=0, key=KEYS[0].hex(), reason="evicted", detail="host lru", at_s=12.5
            )
        ]


def test_misses_of_an_unknown_request() -> None:
    with rig(question_timeout_s=0.05) as made:
        assert made.client.get("/v1/misses/r").status_code == 404
        greeted(made)
        assert made.client.get("/v1/misses/r").status_code == 504
        assert made.client.get("/v1/misses/r", params={"instance": "no"}).status_code == 404


# The same request twice.


def test_the_same_request_with_the_same_key_is_carried_out_once() -> None:
    with rig(idempotency_keep_s=100) as made:
        instance = greeted(made)
        job = ask(made, "clear", key="k1")
        instance.obey()
        assert made.job(job.id).state == "done"
        assert ask(made, "clear", key="k1") == job, "the first answer, as it was"
        pin = ask(made, "pins", key="k2", owner="me", ttl_s=60, instances=["i0"])
        assert ask(made, "pins", key="k2", owner="me", ttl_s=60, instances=["i0"]) == pin
        assert len(pins(made)) == 1 and len(made.get("/v1/jobs")["jobs"]) == 2
        for op, body in (("clear", {"tiers": ["host"]}), ("compress", {"tier": "disk"})):
            assert ask(made, op, key="k1", status=422, **body).code == "idempotency_key_used"
        made.clock.now_s += 101
        instance.sync()
        assert ask(made, "clear", key="k1").id != job.id


def test_of_two_at_the_same_time_one_makes_it() -> None:
    with rig() as made:
        greeted(made)
        start, seen = threading.Barrier(4), []

        def make() -> None:
            start.wait()
            seen.append(made.post("/v1/clear", {"select": SELECT}, key="k"))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len({found["id"] for found in seen}) == 1 and len(seen) == 4
        assert len(made.get("/v1/jobs")["jobs"]) == 1


def test_a_refused_request_may_be_tried_again_with_its_key() -> None:
    with rig() as made:
        ask(made, "clear", key="k", status=404)
        greeted(made)
        ask(made, "clear", key="k")


def test_keys_are_bounded() -> None:
    with rig(max_idempotency_keys=2) as made:
        greeted(made)
        for number in range(2):
            ask(made, "clear", key=f"k{number}")
        assert ask(made, "clear", key="k2", status=429).code == "too_many_keys"
        ask(made, "clear", key="k1")
        for bad in ("k" * 129, "a b"):
            headers = {"idempotency-key": bad}
            answer = made.client.post("/v1/clear", json={"select": SELECT}, headers=headers)
            assert answer.status_code == 422
