"""Jobs, from the request to the end: told, done once, stopped, lost, kept."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from controller_ops import (
    SELECT,
    SERVED,
    ask,
    greeted,
    pins,
)
from controller_rig import (
    Clock,
    rig,
    until,
)

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.state_sqlite import SqliteState

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
    clock = Clock()
    with rig(SqliteState(path, wall_s=clock), clock=clock, **limits, tick_s=60) as made:
        greeted(made)
        old = ask(made, "clear")
        made.clock.now_s += 50
        job = ask(made, "clear")
    clock.now_s += 60
    with rig(SqliteState(path, wall_s=clock), clock=clock, **limits) as made:
        assert made.job(old.id, wait_s=10).error == "i0: not done in time"
        assert made.job(job.id).state == "running"
        clock.now_s += 21
        assert made.job(job.id, wait_s=10).error == "i0: instance lost"
