"""Waiting for jobs: their end, their failures, and Ctrl-C."""

from __future__ import annotations

import signal
import threading

import msgspec
import pytest
from cli_fleet_rig import (
    CLEAR,
    DROPPED,
    LIMIT_S,
    FakeController,
    Says,
    controller,
    job,
    lmc,
    lmc_process,
    says,
    until,
)

from lmcache_core.cli import fleet_jobs, fleet_link
from lmcache_core.controller.messages import (
    Job,
    Part,
    Pin,
)

__all__ = ["controller"]
GAPS = Part(number=2, instance="e2", op="copy", state="done", errors={"no_room": 2})
BAD_PART = Part(number=1, instance="e1", op="clear", state="failed", error="instance lost")


def test_a_command_waits_for_the_end_of_its_job(controller: FakeController) -> None:
    controller.on("POST", "/v1/clear", says(job("running", settled=0), 202))
    controller.on("GET", "/v1/jobs/j1", job("running", settled=2), job())
    result = lmc(*CLEAR)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "job j1: clear done, 4 chunks, 2.0 KiB, 2.5 s\n"
    waits = [float(asked.query["wait_s"]) for asked in controller.asked_for("GET", "/v1/jobs/j1")]
    assert len(waits) == 2 and all(0 < wait_s <= 30 for wait_s in waits)


def test_no_wait_prints_the_id_alone(controller: FakeController) -> None:
    controller.on("POST", "/v1/clear", says(job("running"), 202))
    result = lmc(*CLEAR, "--no-wait")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "j1\n", "")
    shown = lmc(*CLEAR, "--no-wait", "--json")
    assert msgspec.json.decode(shown.stdout, type=Job) == job("running")


@pytest.mark.parametrize(
    ("ended", "reasons"),
    [
        (job("failed", error="instance lost"), ["error: clear failed: instance lost"]),
        (job("cancelled"), ["error: clear cancelled"]),
        (
            job("done", errors={"no_room": 1, "gone": 3}),
            ["error: clear is done in part: 3 gone, 1 no_room"],
        ),
        (job("done", parts=[BAD_PART]), ["error: e1, clear: instance lost"]),
        (job("done", parts=[GAPS]), ["error: e2, copy: 2 no_room"]),
        (
            job("failed", parts=[BAD_PART]),
            ["error: clear failed", "error: e1, clear: instance lost"],
        ),
    ],
    ids=["failed", "cancelled", "chunks", "part", "gaps", "all"],
)
@pytest.mark.parametrize("line", [CLEAR, ["jobs", "j1", "--wait"], ["jobs", "j1"]], ids=" ".join)
def test_what_did_not_go_as_asked_is_exit_1_with_reasons(
    controller: FakeController, line: list[str], ended: Job, reasons: list[str]
) -> None:
    controller.on("POST", "/v1/clear", says(ended, 202))
    controller.on("GET", "/v1/jobs/j1", ended)
    for options in ([], ["--json"]):
        result = lmc(*line, *options)
        assert (result.exit_code, result.stderr.splitlines()) == (1, reasons)
        assert "j1" in result.stdout


def test_many_reasons_are_cut(controller: FakeController) -> None:
    parts = [msgspec.structs.replace(BAD_PART, number=number) for number in range(1000)]
    controller.on("POST", "/v1/clear", says(job("failed", parts=parts), 202))
    lines = lmc(*CLEAR).stderr.splitlines()
    assert len(lines) == fleet_jobs.MAX_REASONS + 1
    assert lines[-1].startswith("and 981 more: lmc jobs j1")


def test_a_job_that_outlasts_the_wait_is_exit_4(controller: FakeController) -> None:
    controller.on("POST", "/v1/clear", says(job("running"), 202))
    controller.on("GET", "/v1/jobs/j1", job("running"))
    for line in ([*CLEAR, "--timeout-s", "0.05"], ["jobs", "j1"], ["jobs", "j1", "--json"]):
        result = lmc(*line)
        assert result.exit_code == 4 and "j1" in result.stdout
    assert "lmc jobs j1 --cancel ends it" in lmc(*CLEAR, "--timeout-s", "0.05").stderr


def test_a_pins_job_decides_its_exit_code(controller: FakeController) -> None:
    pin = Pin(
        id="p1",
        owner="ci",
        instances=["e0"],
        tier="host",
        model="m",
        chunks=4,
        made_s=1.0,
        until_s=2e9,
        job="j1",
    )
    controller.on("POST", "/v1/pins", says(pin, 201))
    controller.on("GET", "/v1/jobs/j1", job("done", kind="pin", errors={"quota": 2}))
    line = ["pin", "--text", "x", "--owner", "ci"]
    result = lmc(*line, "--json")
    assert (result.exit_code, result.stderr) == (1, "error: pin is done in part: 2 quota\n")
    assert msgspec.json.decode(result.stdout, type=Pin) == pin
    unwaited = lmc(*line, "--no-wait")
    assert (unwaited.exit_code, unwaited.stdout) == (0, "p1\n")


def test_a_cancelled_job_is_watched_to_its_end(controller: FakeController) -> None:
    controller.on("POST", "/v1/jobs/j1/cancel", says(job("running"), 202))
    controller.on("GET", "/v1/jobs/j1", job("running"), job("cancelled"))
    result = lmc("jobs", "j1", "--cancel", "--wait")
    assert (result.exit_code, result.stderr) == (0, "")
    controller.on("GET", "/v1/jobs/j1", job("failed", error="e0 is lost"))
    assert lmc("jobs", "j1", "--cancel", "--wait").exit_code == 1, "it ended otherwise"


def test_a_controller_that_is_away_for_a_while_does_not_end_the_wait(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_link, "PAUSE_S", 0.0)
    controller.on("POST", "/v1/clear", says(job("running"), 202))
    controller.on("GET", "/v1/jobs/j1", DROPPED, DROPPED, DROPPED, DROPPED, DROPPED, job())
    assert lmc(*CLEAR).exit_code == 0
    monkeypatch.setattr(fleet_jobs, "AWAY_S", 0.0)
    controller.on("GET", "/v1/jobs/j1", DROPPED)
    result = lmc(*CLEAR)
    assert result.exit_code == 3
    assert "lmc jobs j1 --wait watches it" in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_leaves_the_job_running_and_says_what_to_do(
    controller: FakeController, options: list[str]
) -> None:
    over = threading.Event()
    controller.on("POST", "/v1/clear", says(job("running"), 202))
    controller.on("GET", "/v1/jobs/j1", Says(200, msgspec.json.encode(job()), hold=over))
    with lmc_process(*CLEAR, *options) as process:
        until(lambda: bool(controller.asked_for("GET", "/v1/jobs/j1")))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        over.set()
    assert process.returncode == 130
    assert err.decode() == (
        "interrupted; the job goes on: lmc jobs j1 --wait watches it, "
        "lmc jobs j1 --cancel ends it\n"
    )
    if options:
        assert msgspec.json.decode(out, type=Job) == job("running")
    else:
        assert out == b""


def test_ctrl_c_before_the_answer_says_that_a_job_may_run(controller: FakeController) -> None:
    over = threading.Event()
    controller.on("POST", "/v1/clear", Says(202, msgspec.json.encode(job()), hold=over))
    with lmc_process(*CLEAR) as process:
        until(lambda: bool(controller.asked))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        over.set()
    assert (process.returncode, out) == (130, b"")
    assert err == b"interrupted before an answer came: `lmc jobs` shows what runs\n"
