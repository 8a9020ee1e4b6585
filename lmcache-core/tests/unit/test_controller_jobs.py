"""What operators ask for, from the request to its end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_rig import FakeInstance, Rig, keys_of, model, namespace_of, prompt, rig, tier, until

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages
from lmcache_core.controller.actions import SLICE_KEYS
from lmcache_core.controller.state_sqlite import SqliteState

SERVED = model()
TOKENS = prompt(3)
KEYS = keys_of(SERVED, TOKENS)
SELECT = {"tokens": TOKENS, "model": "m"}


def greeted(made: Rig, name: str = "i0", **fields: Any) -> FakeInstance:
    given = {"models": (SERVED,), "status": {"channel": f"tcp://{name}:1"}, **fields}
    instance: FakeInstance = made.instance(name, **given)
    instance.sync()
    return instance


def ask(made: Rig, op: str, *, status: int = 0, key: str = "", **body: Any) -> Any:
    found = made.post(f"/v1/{op}", {"select": SELECT, **body}, status=status, key=key)
    if status >= 400:
        return msgspec.convert(found, messages.Problem).error
    return msgspec.convert(found, messages.Pin if op == "pins" else messages.Job)


def place(instance: str, tier: str) -> dict[str, str]:
    return {"instance": instance, "tier": tier}


def asked(instance: FakeInstance) -> wire.Question:
    """The question that an instance is asked, waited for."""
    until(lambda: instance.sync(wait_s=1.0) and instance.questions)
    (question,) = instance.questions
    return question


def until_ended(made: Rig, job: str, *instances: FakeInstance) -> messages.Job:
    """The job when its instances have done all that they were told."""

    def ended() -> bool:
        for instance in instances:
            instance.obey()
        return made.job(job).state != "running"

    until(ended)
    return made.job(job)


# Clear.


def test_a_clear_is_by_instance_and_tier() -> None:
    with rig() as made:
        one, other = greeted(made, "one"), greeted(made, "other", tiers=("host",))
        job = ask(made, "clear", instances=["one"], tiers=["disk"])
        assert other.take(0.0) == []
        (order,) = one.take()
        assert isinstance(order, wire.Clear) and order.tiers == ("disk",)
        assert ask(made, "clear", tiers=["disk"]).parts[0].instance == "one"
        assert len(job.parts) == 1
        greeted(made, "engine", kind="engine", tiers=(), status={})
        assert {part.instance for part in ask(made, "clear").parts} == {"one", "other"}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"instances": ["no"]}, 404, "'no'"),
        ({"tiers": ["no"]}, 404, "'no'"),
        ({"instances": ["i0"], "tiers": ["host", "no"]}, 404, "'no'"),
        ({"instances": ["engine"]}, 409, "holds no chunks"),
    ],
)
def test_a_clear_of_no_place_is_refused(body: dict[str, Any], status: int, said: str) -> None:
    with rig() as made:
        greeted(made)
        greeted(made, "engine", kind="engine", tiers=(), status={})
        assert said in ask(made, "clear", status=status, **body).message
        assert made.get("/v1/jobs")["jobs"] == []


def test_progress_is_shown_and_an_order_is_told_until_it_is_known() -> None:
    with rig() as made:
        instance = greeted(made)
        job = ask(made, "clear")
        (order,) = instance.take()
        assert instance.take(0.0) == [], "it was told a moment ago"
        made.clock.now_s += 3
        assert instance.take() == [order], "the answer may have been lost"
        said = wire.Progress(id=order.id, state="running", total=9, settled=4, nbytes=40)
        instance.sync(progress=(said,))
        made.clock.now_s += 3
        assert instance.take(0.0) == [], "it has said that it is at it"
        shown = made.job(job.id)
        assert (shown.total, shown.settled, shown.bytes) == (9, 4, 40)
        assert shown.parts[0].state == "running"
        instance.ends(order, total=9, settled=9, nbytes=90, errors={"lost": 2})
        shown = made.job(job.id)
        assert (shown.state, shown.settled, shown.errors) == ("done", 9, {"lost": 2})
        assert shown.ended_s == made.clock.now_s


def test_who_waits_for_a_job_is_told_at_its_end() -> None:
    with rig() as made:
        instance = greeted(made)
        job = ask(made, "clear")
        seen: list[messages.Job] = []
        waiting = threading.Thread(target=lambda: seen.append(made.job(job.id, wait_s=20)))
        waiting.start()
        until(lambda: made.controller.jobs._changed)
        instance.obey()
        waiting.join(10)
        assert seen[0].state == "done"
        assert made.job(job.id, wait_s=20).state == "done", "at once"


def test_a_new_process_does_what_the_old_one_was_at() -> None:
    with rig() as made:
        instance = greeted(made)
        job = ask(made, "clear")
        (order,) = instance.take()
        instance.sync(progress=(wire.Progress(id=order.id, state="running", settled=5, total=9),))
        made.clock.now_s += 5
        instance.restarts()
        assert instance.take() == [order]
        instance.ends(order)
        assert made.job(job.id).state == "done"


def test_parts_of_the_lost_fail_and_say_so() -> None:
    with rig(lease_s=10) as made:
        instance, other = greeted(made), greeted(made, "other")
        job = ask(made, "clear")
        other.obey()
        made.clock.now_s += 9
        other.sync()
        assert made.job(job.id).state == "running", "within the lease"
        made.clock.now_s += 5
        shown = made.job(job.id, wait_s=10)
        assert (shown.state, shown.error) == ("failed", "i0: instance lost")
        assert [part.state for part in shown.parts] == ["failed", "done"]
        assert instance.sync().orders == (), "what has failed is not done later"


def test_a_job_does_not_last_for_ever() -> None:
    with rig(job_timeout_s=100) as made:
        instance = greeted(made)
        job = ask(made, "clear")
        (order,) = instance.take()
        running = wire.Progress(id=order.id, state="running")
        instance.sync(progress=(running,))
        made.clock.now_s += 101
        instance.sync()
        shown = made.job(job.id, wait_s=10)
        assert (shown.state, shown.error) == ("failed", "i0: not done in time")
        instance.sync(progress=(running,))
        assert instance.cancelled == [order.id], "and nobody works at it"


def test_a_cancelled_job_is_stopped_where_it_runs() -> None:
    with rig() as made:
        instance, idle = greeted(made), greeted(made, "idle")
        job = ask(made, "clear")
        (order,) = instance.take()
        instance.sync(progress=(wire.Progress(id=order.id, state="running", settled=1, total=9),))
        answer = made.client.post(f"/v1/jobs/{job.id}/cancel")
        assert answer.status_code == 200 and answer.json()["state"] == "running"
        instance.sync()
        assert instance.cancelled == [order.id]
        assert idle.take(0.0) == [], "what has not begun never does"
        instance.ends(order, "cancelled", settled=2, total=9)
        shown = made.job(job.id)
        assert (shown.state, shown.settled) == ("cancelled", 2)
        again = made.client.post(f"/v1/jobs/{job.id}/cancel")
        assert again.json()["state"] == "cancelled"


def test_jobs_are_listed_newest_first_and_kept_for_a_while() -> None:
    with rig(max_jobs=2, job_keep_s=100) as made:
        instance = greeted(made)
        ids = []
        for _ in range(3):
            ids.append(ask(made, "clear").id)
            instance.obey()
            made.clock.now_s += 1
        running = ask(made, "clear").id
        instance.orders.clear()

        def listed(**query: Any) -> list[str]:
            return [job.id for job in made.get("/v1/jobs", messages.Jobs, **query).jobs]

        until(lambda: listed() == [running, ids[2], ids[1]])
        assert listed(state="running") == [running] and listed(state="done") == [ids[2], ids[1]]
        assert listed(limit=1) == [running]
        assert made.client.get(f"/v1/jobs/{ids[0]}").status_code == 404
        made.clock.now_s += 101
        instance.sync()
        until(lambda: listed() == [running])


def test_so_many_jobs_run_at_a_time() -> None:
    with rig(max_live_jobs=2) as made:
        instance = greeted(made)
        for _ in range(2):
            ask(made, "clear")
        answer = made.client.post("/v1/clear", json={"select": SELECT})
        assert answer.status_code == 429 and answer.headers["retry-after"]
        instance.obey()
        ask(made, "clear")


# Move and copy.


def test_a_move_within_an_instance_clears_what_was_confirmed() -> None:
    with rig() as made:
        instance = greeted(made)
        instance.stores("disk", KEYS)
        job = ask(made, "move", source=place("i0", "disk"), target=place("i0", "host"))
        (copy,) = instance.take()
        assert isinstance(copy, wire.Copy) and (copy.source, copy.target) == ("disk", "host")
        assert wire.split(copy.keys) == KEYS and copy.kinds == SERVED.kinds and copy.chained
        assert copy.peer == ""
        instance.ends(copy, held=wire.join(KEYS[:2]), total=3, settled=3, errors={"no_room": 1})
        (clear,) = instance.take()
        assert isinstance(clear, wire.Clear) and clear.tiers == ("disk",)
        assert wire.split(clear.keys or b"") == KEYS[:2], "what was not confirmed stays"
        instance.ends(clear)
        shown = made.job(job.id)
        assert (shown.state, shown.errors) == ("done", {"no_room": 1})
        assert [part.op for part in shown.parts] == ["copy", "clear"]


def test_a_move_to_another_instance() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("disk", KEYS)
        job = ask(made, "move", source=place("giver", "disk"), target=place("taker", "disk"))
        (hold,) = giver.take()
        assert isinstance(hold, wire.Copy) and (hold.source, hold.target) == ("disk", "host")
        assert hold.pin == f"job:{job.id}:0" and hold.chained
        assert taker.take(0.0) == []
        giver.ends(hold, held=wire.join(KEYS[:2]), total=3)
        (take,) = taker.take()
        assert isinstance(take, wire.Copy) and (take.target, take.peer) == ("disk", "tcp://giver:1")
        assert wire.split(take.keys) == KEYS[:2] and take.pin == ""
        assert not take.chained, "one of them is missing"
        taker.ends(take, held=wire.join(KEYS[1:2]))
        (drop,) = giver.take()
        assert isinstance(drop, wire.Clear) and drop.tiers == ("disk",)
        assert wire.split(drop.keys or b"") == KEYS[1:2]
        giver.ends(drop)
        (release,) = giver.take()
        assert isinstance(release, wire.Unpin) and release.pin == hold.pin
        giver.ends(release)
        assert made.job(job.id).state == "done"


def test_a_copy_to_another_instance_drops_nothing() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("host", KEYS)
        job = ask(made, "copy", source=place("giver", "host"), target=place("taker", "host"))
        shown = until_ended(made, job.id, giver, taker)
        assert shown.state == "done"
        assert [part.op for part in shown.parts] == ["copy", "copy", "unpin"]
        assert giver.held["host"] == taker.held["host"] == set(KEYS)
        found = made.post("/v1/lookup", {"select": SELECT})["instances"]
        assert [row["chunks"] for row in found] == [3, 3]


def test_a_failed_transfer_drops_nothing_and_lets_go() -> None:
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("host", KEYS)
        job = ask(made, "move", source=place("giver", "host"), target=place("taker", "host"))
        giver.obey()
        (take,) = taker.take()
        taker.ends(take, "failed", error="the peer is away")
        (release,) = giver.take()
        assert isinstance(release, wire.Unpin)
        giver.ends(release)
        shown = made.job(job.id)
        assert (shown.state, shown.error) == ("failed", "taker: the peer is away")
        assert giver.held["host"] == set(KEYS)


def test_much_is_moved_in_slices_one_after_the_other() -> None:
    keys = [SERVED.tag + n.to_bytes(32, "big") + bytes(6) for n in range(2 * SLICE_KEYS + 1)]
    with rig() as made:
        giver, taker = greeted(made, "giver"), greeted(made, "taker")
        giver.stores("disk", keys)
        job = ask(
            made, "move", select={"model": "m"},
            source=place("giver", "disk"), target=place("taker", "host"),
        )  # fmt: skip
        assert len(job.parts) == 12
        (hold,) = giver.take()
        giver.orders = [hold]
        assert isinstance(hold, wire.Copy) and len(wire.split(hold.keys)) == SLICE_KEYS
        shown = until_ended(made, job.id, giver, taker)
        assert shown.state == "done"
        assert taker.held["host"] == set(keys) and giver.held["disk"] == set()


def test_only_what_the_source_has_is_moved() -> None:
    salted = namespace_of(SERVED, tenant_salt="a")
    note = wire.NamespaceNote(salted.tag, SERVED.tag, tenant_id("a"))
    theirs = keys_of(SERVED, TOKENS, tenant_salt="a")
    with rig() as made:
        instance = greeted(made, notes=(note,))
        instance.stores("host", [*KEYS[:2], *theirs])
        ask(made, "copy", source=place("i0", "host"), target=place("i0", "disk"))
        (order,) = instance.take()
        assert isinstance(order, wire.Copy) and wire.split(order.keys) == KEYS[:2]
        assert not order.chained
        ask(
            made, "copy", select={"tenant": "a"},
            source=place("i0", "host"), target=place("i0", "disk"),
        )  # fmt: skip
        (order,) = instance.take()
        assert isinstance(order, wire.Copy) and wire.split(order.keys) == sorted(theirs)
        nothing = ask(made, "copy", source=place("i0", "disk"), target=place("i0", "host"))
        assert nothing.state == "done" and nothing.parts == []


@pytest.mark.parametrize(
    ("source", "target", "status", "said"),
    [
        (place("no", "host"), place("i0", "host"), 404, "'no'"),
        (place("i0", "host"), place("i0", "tape"), 404, "'tape'"),
        (place("i0", "host"), place("i0", "host"), 422, "same tier"),
        (place("i0", "host"), place("i0", "read-only"), 409, "not written"),
        (place("i0", "host"), place("alone", "host"), 409, "no channel"),
        (place("alone", "host"), place("i0", "host"), 409, "no channel"),
        (place("engine", "host"), place("i0", "host"), 409, "holds no chunks"),
        (place("gone", "host"), place("i0", "host"), 409, "is lost"),
    ],
)
def test_a_move_that_can_not_be_is_refused(
    source: dict[str, str], target: dict[str, str], status: int, said: str
) -> None:
    tiers = ("host", "disk", "read-only")
    told = tuple(tier(name, writable=name != "read-only") for name in tiers)
    with rig(lease_s=10) as made:
        greeted(made, "gone")
        made.clock.now_s += 11
        greeted(made, tiers=tiers, status={"tiers": told, "channel": "tcp://i0:1"})
        greeted(made, "alone", status={})
        greeted(made, "engine", kind="engine", tiers=(), status={})
        problem = ask(made, "move", status=status, source=source, target=target)
        assert said in problem.message and problem.code
        assert made.get("/v1/jobs")["jobs"] == []


def test_chunks_of_an_unknown_model_are_not_moved() -> None:
    with rig() as made:
        greeted(made)
        problem = ask(
            made, "copy", status=409, select={"keys": ["00" * 46]},
            source=place("i0", "host"), target=place("i0", "disk"),
        )  # fmt: skip
        assert problem.code == "unknown_model"


def test_one_that_holds_what_it_was_not_to_is_refused() -> None:
    with rig() as made:
        instance, other = greeted(made), greeted(made, "other")
        instance.stores("disk", KEYS)
        job = ask(made, "move", source=place("i0", "disk"), target=place("i0", "host"))
        (copy,) = instance.take()
        strangers = keys_of(SERVED, prompt(1, start=9000))
        for liar, held in ((instance, wire.join(strangers)), (instance, b"x"), (other, b"")):
            said = wire.Progress(id=copy.id, state="done", held=held)
            answer = liar.post(
                wire.Sync(
                    version=1, instance=liar.name, incarnation="p0", kind="embedded",
                    seq=liar.seq, progress=(said,),
                )
            )  # fmt: skip
            assert answer.status_code == 400, answer.text
        assert made.job(job.id).parts[0].state == "waiting"


# Compress.


def test_chunks_are_compressed_where_they_are() -> None:
    with rig() as made:
        instance = greeted(made)
        greeted(made, "other", tiers=("host",))
        job = ask(made, "compress", tier="disk", codec="zstd", level="3")
        assert [part.instance for part in job.parts] == ["i0"]
        (order,) = instance.take()
        assert isinstance(order, wire.Recode)
        assert (order.tier, order.codec, order.level) == ("disk", "zstd", "3")
        assert wire.split(order.keys or b"") == KEYS and order.kinds == SERVED.kinds
        instance.ends(order, notes={"before_bytes": 100, "after_bytes": 40})
        assert made.job(job.id).parts[0].notes == {"before_bytes": 100, "after_bytes": 40}
        ask(made, "decompress", tier="disk", select={"model": "m"})
        (order,) = instance.take()
        assert isinstance(order, wire.Recode) and order.codec == ""
        assert order.keys is None and order.tags == (SERVED.tag,)


def test_compressing_needs_a_codec_and_a_tier() -> None:
    with rig() as made:
        greeted(made)
        assert ask(made, "compress", status=422, tier="disk").code == "no_codec"
        assert ask(made, "decompress", status=422, tier="disk", codec="zstd").code == "bad_codec"
        assert ask(made, "compress", status=404, tier="tape", codec="zstd").message
        ask(made, "compress", status=404, tier="disk", codec="zstd", instances=["no"])


# Pins.


def pins(made: Rig) -> list[messages.Pin]:
    found: list[messages.Pin] = made.get("/v1/pins", messages.Pins).pins
    return found


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


# After a restart.


def test_jobs_go_on_and_pins_hold_after_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    with rig(SqliteState(path)) as made:
        instance = greeted(made)
        clear = ask(made, "clear", key="k")
        pin = ask(made, "pins", owner="me", ttl_s=60, instances=["i0"])
        made.client.put("/v1/quotas", json={"bytes": 5, "tenant": "t"})
        assert len(instance.take()) == 2
    with rig(SqliteState(path)) as made:
        assert made.get("/v1/health")["instances"] == 0
        assert ask(made, "clear", key="k") == clear
        instance = made.instance(models=(SERVED,))
        taken = instance.take()
        assert {type(order) for order in taken} == {wire.Clear, wire.Pin}
        for order in taken:
            instance.ends(order)
        assert made.job(clear.id).state == made.job(pin.job).state == "done"
        assert pins(made) == [pin]
        assert made.get("/v1/quotas")["quotas"][0]["bytes"] == 5


def test_an_instance_that_is_not_back_yet_is_not_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    with rig(SqliteState(path)) as made:
        greeted(made)
        now_s = made.clock.now_s
        assert len(ask(made, "clear").parts) == 1
    state = SqliteState(path, wall_s=lambda: now_s)
    with rig(state) as made:
        assert [part.instance for part in ask(made, "clear").parts] == ["i0"]


def test_after_a_long_absence_instances_have_time_to_come_back(tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    limits = {"lease_s": 20, "job_timeout_s": 100}
    with rig(SqliteState(path), **limits) as made:
        greeted(made)
        old = ask(made, "clear")
        made.clock.now_s += 50
        job = ask(made, "clear")
        clock = made.clock
    clock.now_s += 60
    with rig(SqliteState(path, wall_s=clock), clock=clock, **limits) as made:
        assert made.job(old.id, wait_s=10).error == "i0: not done in time"
        assert made.job(job.id).state == "running"
        clock.now_s += 21
        assert made.job(job.id, wait_s=10).error == "i0: instance lost"
