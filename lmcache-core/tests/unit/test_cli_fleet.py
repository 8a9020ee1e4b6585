"""``lmc``'s fleet commands: what each asks a controller, and what it makes of the answer."""

from __future__ import annotations

import msgspec
import pytest
from cli_fleet_cases import CASES, E0, HEALTH, LINES, MISSED, USED, Case
from cli_fleet_rig import TOKEN, FakeController, controller, job, lmc, refuses, says

from lmcache_core.cli import fleet_link
from lmcache_core.controller.messages import (
    Instances,
    Job,
    Jobs,
    Pins,
    Prefixes,
    Quotas,
    UsageReply,
)

__all__ = ["controller"]


def prepared(controller: FakeController, case: Case) -> None:
    controller.on(*case.asks.split(" ", 1), says(case.answer, case.status))
    for asks, answer in case.also:
        controller.on(*asks.split(" ", 1), answer)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_command_asks_for_what_it_says_and_shows_the_answer(
    controller: FakeController, case: Case
) -> None:
    prepared(controller, case)
    result = lmc(*case.line, stdin="[1, 2, 3]")
    assert (result.exit_code, result.stderr) == (0, "")
    missing = [text for text in case.shows if text not in result.stdout]
    assert not missing, result.stdout
    [asked] = controller.asked_for(*case.asks.split(" ", 1))
    assert asked.headers["authorization"] == f"Bearer {TOKEN}"
    if case.body_type is not None:
        sent = msgspec.json.decode(asked.body, type=case.body_type)
        assert sent == msgspec.convert(case.sends, case.body_type)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_json_is_the_controllers_answer_and_nothing_else(
    controller: FakeController, case: Case
) -> None:
    prepared(controller, case)
    result = lmc(*case.line, "--json", stdin="[1, 2, 3]")
    assert (result.exit_code, result.stderr) == (0, "")
    assert msgspec.json.decode(result.stdout, type=type(case.answer)) == case.answer


def test_a_quota_is_ended(controller: FakeController) -> None:
    controller.on("DELETE", "/v1/quotas/q1", says(None, 204))
    result = lmc("quota", "--remove", "q1")
    assert (result.exit_code, result.stdout) == (0, "quota q1 ended\n")
    assert lmc("quota", "--remove", "q1", "--json").stdout == "null\n"


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_each_command_ends_with_3_when_no_controller_answers(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch, line: list[str]
) -> None:
    monkeypatch.setattr(fleet_link, "PAUSE_S", 0.0)
    result = lmc(*line, "--controller", "http://127.0.0.1:1", stdin="[1, 2, 3]")
    assert (result.exit_code, result.stdout) == (3, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: the controller at http://127.0.0.1:1 can't be reached: ")
    assert hint == "hint: is `lmc controller` running there?"


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_each_command_ends_with_2_when_the_controller_says_no(
    controller: FakeController, line: list[str]
) -> None:
    result = lmc(*line, stdin="[1, 2, 3]")
    assert (result.exit_code, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: nothing at /v1/") and hint == "hint: do it right"


@pytest.mark.parametrize("name", dict.fromkeys(line[0] for line in LINES))
def test_each_command_has_examples_and_names_its_exit_codes(name: str) -> None:
    result = lmc(name, "--help")
    assert result.exit_code == 0
    assert f"Examples:  lmc {name}" in result.stdout
    for code in ("Exit codes: 0 ", " 2 wrong command line", " 3 no controller"):
        assert code in " ".join(result.stdout.split()), result.stdout


def test_a_degraded_fleet_is_exit_1_with_its_problems(controller: FakeController) -> None:
    bad = msgspec.structs.replace(HEALTH, status="degraded", problems=["e1 is lost", "e0: \x1b[2J"])
    controller.on("GET", "/v1/health", bad)
    controller.on("GET", "/v1/instances", Instances(instances=[]))
    result = lmc("status")
    assert result.exit_code == 1
    assert "problem: e1 is lost\nproblem: e0: \\x1b[2J\n" in result.stdout
    assert "no instances yet" in result.stdout
    assert lmc("status", "--json").exit_code == 1


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (["usage"], UsageReply(usage=[])),
        (["pins"], Pins(pins=[])),
        (["jobs"], Jobs(jobs=[])),
        (["prefixes"], Prefixes(prefixes=[])),
        (["quota"], Quotas(quotas=[])),
        (["instances"], Instances(instances=[])),
    ],
)
def test_nothing_is_said_in_words(
    controller: FakeController, line: list[str], answer: object
) -> None:
    controller.on("GET", f"/v1/{'quotas' if line == ['quota'] else line[0]}", answer)
    result = lmc(*line)
    assert result.exit_code == 0 and result.stdout.startswith(("no ", "nothing is stored"))


def test_filters_are_handed_on_and_empty_ones_are_not(controller: FakeController) -> None:
    controller.on("GET", "/v1/usage", USED)
    controller.on("GET", "/v1/jobs", Jobs(jobs=[]))
    controller.on("GET", "/v1/misses/r1", MISSED)
    lmc("usage", "--instance", "e0")
    lmc("jobs", "--state", "running", "--limit", "3")
    lmc("misses", "r1", "--instance", "e0")
    queries = [asked.query for asked in controller.asked]
    assert queries == [{"instance": "e0"}, {"state": "running", "limit": "3"}, {"instance": "e0"}]


def test_names_with_what_steers_a_terminal_are_shown_harmless(controller: FakeController) -> None:
    hostile = msgspec.structs.replace(E0, name="e0\x1b]0;owned\x07", models=["[bold]m[/bold]"])
    controller.on("GET", "/v1/instances", Instances(instances=[hostile]))
    for line in (["instances"], ["instances", "--json"]):
        result = lmc(*line)
        assert result.exit_code == 0
        assert "\x1b]" not in result.stdout and "\x07" not in result.stdout
        assert "[bold]m[/bold]" in result.stdout


def test_a_truncated_usage_says_so(controller: FakeController) -> None:
    controller.on("GET", "/v1/usage", msgspec.structs.replace(USED, truncated=True))
    assert "there is more" in lmc("usage").stderr


def test_a_later_controllers_further_fields_do_no_harm(controller: FakeController) -> None:
    later = msgspec.to_builtins(job()) | {"colour": "red"}
    controller.on("GET", "/v1/jobs/j1", later)
    result = lmc("jobs", "j1", "--json")
    assert result.exit_code == 0 and msgspec.json.decode(result.stdout)["colour"] == "red"
    assert msgspec.json.decode(result.stdout, type=Job) == job()


def test_a_refusal_without_a_hint_gets_one_of_ours(controller: FakeController) -> None:
    controller.on("GET", "/v1/health", refuses(401, "unauthorized", "wrong token", ""))
    result = lmc("status")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: wrong token",
        "hint: --token-file names the token of that controller",
    ]
