"""How a job goes on: pure steps, told twice, late, by others, or never."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lmcache_core.agent import wire
from lmcache_core.controller import plans
from lmcache_core.controller.plans import owed, progressed, settle, state_of
from lmcache_core.controller.records import JobRecord, PartRecord

KEY = bytes(46)


def part(instance: str = "a", **fields: Any) -> PartRecord:
    return PartRecord(instance=instance, op="copy", order="o", **fields)


def job(*parts: PartRecord, **fields: Any) -> JobRecord:
    made = JobRecord(id="j", kind="move", made_s=0.0, until_s=100.0, parts=parts, **fields)
    return settle(made, 0.0)


def moving() -> JobRecord:
    """Hold at a, take at b, drop at a, release at a."""
    return job(
        part("a"),
        part("b", after=(0,), needs=(0,), keys_of=0),
        part("a", after=(1,), needs=(1,), keys_of=1),
        part("a", after=(0, 2), cleanup=True),
    )


def said(state: str = "done", **fields: Any) -> wire.Progress:
    return wire.Progress(id="j.0", state=state, **fields)  # type: ignore[arg-type]


def tell(
    known: JobRecord, number: int, state: str = "done", *, by: str = "p", **fields: Any
) -> JobRecord:
    return progressed(known, number, said(state, **fields), incarnation=by, now_s=1.0)


def states(known: JobRecord) -> list[str]:
    return [part.state for part in known.parts]


def test_an_order_is_owed_when_those_before_it_are_done() -> None:
    known = moving()
    assert owed(known, "a", "p") == [0] and owed(known, "b", "p") == []
    known = tell(known, 0, held=KEY)
    assert owed(known, "a", "p") == [] and owed(known, "b", "p") == [1]
    known = tell(known, 1, held=KEY)
    assert owed(known, "a", "p") == [2]
    known = tell(known, 2)
    assert owed(known, "a", "p") == [3]
    known = tell(known, 3)
    assert (known.ended_s, state_of(known)) == (1.0, "done")
    assert owed(known, "a", "other") == []


def test_what_an_older_process_was_at_is_owed_to_the_newer() -> None:
    known = tell(moving(), 0, "running", by="p")
    assert owed(known, "a", "p") == [] and owed(known, "a", "q") == [0]
    known = tell(known, 0, "running", by="q", settled=1)
    assert owed(known, "a", "q") == []
    assert 0 not in owed(tell(known, 0, by="q"), "a", "r"), "what has ended is not done again"


def test_telling_twice_or_late_changes_nothing() -> None:
    first = tell(moving(), 0, "running", settled=5, total=9, nbytes=50)
    assert tell(first, 0, "running", settled=5, total=9, nbytes=50) == first
    late = tell(first, 0, "running", settled=3, total=7)
    assert (late.parts[0].settled, late.parts[0].total) == (5, 9)
    done = tell(first, 0, "done", held=KEY, settled=9)
    assert tell(done, 0, "running") is done
    assert tell(done, 0, "failed", error="no") is done


def test_another_process_counts_from_the_beginning() -> None:
    known = tell(moving(), 0, "running", settled=5, total=9)
    known = tell(known, 0, "running", by="q", settled=1, total=8)
    assert (known.parts[0].settled, known.parts[0].total) == (1, 8)


def test_nothing_is_dropped_of_which_nobody_confirmed_a_copy() -> None:
    known = tell(tell(moving(), 0, held=KEY), 1, held=b"")
    assert states(known) == ["done", "done", "done", "waiting"], "of nothing, nothing is dropped"
    assert owed(known, "a", "p") == [3]


def test_a_failure_ends_what_needs_it_and_still_cleans_up() -> None:
    known = tell(tell(moving(), 0, held=KEY), 1, "failed", error="no room")
    assert states(known) == ["done", "failed", "cancelled", "waiting"]
    assert owed(known, "a", "p") == [3]
    known = tell(known, 3)
    shown = plans.shown(known)
    assert (shown.state, shown.error) == ("failed", "b: no room")
    assert shown.parts[2].error == "part 1 was not done"


def test_cancelling_stops_what_runs_and_begins_nothing() -> None:
    known = tell(moving(), 0, "running")
    known = plans.cancelled(known, 2.0)
    assert states(known) == ["running", "cancelled", "cancelled", "waiting"]
    assert plans.unwanted(known, "a", "p") == [0] and plans.unwanted(known, "a", "q") == []
    assert owed(known, "a", "q") == [], "it is not begun again"
    known = tell(known, 0, "cancelled")
    assert owed(known, "a", "p") == [3], "what it held is let go"
    known = tell(known, 3)
    assert state_of(known) == "cancelled"
    assert plans.cancelled(known, 9.0) is known


def test_cancelling_what_has_not_begun_ends_it_at_once() -> None:
    known = plans.cancelled(moving(), 2.0)
    assert set(states(known)) == {"cancelled"} and known.ended_s == 2.0


def test_a_cancelled_part_ends_with_its_process() -> None:
    known = plans.cancelled(tell(job(part("a"), part("b")), 0, "running"), 2.0)
    assert plans.restarted(known, "a", "p", 3.0) is known
    known = plans.restarted(known, "a", "q", 3.0)
    assert states(known) == ["cancelled", "cancelled"] and state_of(known) == "cancelled"


def test_a_cancelled_job_whose_parts_were_done_is_done() -> None:
    known = plans.cancelled(tell(job(part("a")), 0, "running"), 2.0)
    assert state_of(tell(known, 0, "done")) == "done"


def test_parts_of_a_lost_instance_fail_and_the_others_go_on() -> None:
    known = plans.overdue(job(part("a"), part("b")), {"a"}, 3.0)
    assert states(known) == ["failed", "waiting"]
    assert plans.shown(known).error == "a: instance lost" and plans.shown(known).state == "running"
    assert state_of(tell(known, 1)) == "failed"


def test_nothing_lasts_longer_than_its_time() -> None:
    known = moving()
    assert plans.overdue(known, (), 99.0) is known
    known = plans.overdue(tell(known, 0, "running"), (), 100.0)
    assert set(states(known)) == {"failed"} and state_of(known) == "failed"


def test_a_job_of_nothing_is_done() -> None:
    assert state_of(job()) == "done"


@pytest.mark.parametrize("text", ["", "j", "j.", "j.x", "j.-1", "pin:1", "j.\u00b2"])
def test_an_id_of_no_part(text: str) -> None:
    assert plans.part_of(text) is None


def test_an_id_of_a_part() -> None:
    assert plans.part_of(plans.order_id("job-1.2", 3)) == ("job-1.2", 3)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["tell", "cancel", "lost", "restart"]),
        st.integers(0, 7),
        st.sampled_from(["running", "done", "failed", "cancelled"]),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_whatever_happens_a_job_ends_once_and_loses_nothing(
    actions: list[tuple[str, int, str, bool]],
) -> None:
    parts = moving().parts
    after = {n: tuple(4 + m for m in parts[n].after) for n in range(4)}
    second = [
        replace(
            parts[n],
            after=after[n] or (3,),
            needs=tuple(4 + m for m in parts[n].needs),
            keys_of=parts[n].keys_of + 4 if parts[n].keys_of >= 0 else -1,
        )
        for n in range(4)
    ]
    known = job(*parts, *second)
    process = {"a": "p", "b": "p"}
    for action, number, state, holds in actions:
        before = known
        if action == "tell":
            instance = known.parts[number].instance
            if number not in owed(known, instance, "new") and states(known)[number] == "waiting":
                continue  # nobody is told of it
            known = tell(
                known, number, state, by=process[instance],
                held=KEY if holds and state == "done" else b"",
            )  # fmt: skip
        elif action == "cancel":
            known = plans.cancelled(known, 1.0)
        elif action == "lost":
            known = plans.overdue(known, {"ab"[number % 2]}, 1.0)
        else:
            name = "ab"[number % 2]
            process[name] += "+"
            known = plans.restarted(known, name, process[name], 1.0)
        for old, new in zip(before.parts, known.parts):
            assert new == old or old.state in ("waiting", "running"), "an end is an end"
        for start in (0, 4):
            held, taken, dropped, _ = known.parts[start : start + 4]
            if dropped.state in ("running", "done") and dropped.incarnation:
                assert taken.state == "done" and taken.held, "dropped before it was confirmed"
            if taken.incarnation:
                assert held.state == "done"
        assert (known.ended_s is not None) == all(
            s in ("done", "failed", "cancelled") for s in states(known)
        )
    known = plans.overdue(known, (), 1e9)
    assert known.ended_s is not None
