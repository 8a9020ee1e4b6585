"""Controllers that are away, busy or odd, and what shows that one may ask them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli_fleet_rig import (
    CLEAR,
    DROPPED,
    FakeController,
    Says,
    controller,
    job,
    lmc,
    refuses,
    says,
    served,
)

from lmcache_core.cli import fleet_link
from lmcache_core.controller.messages import (
    HealthReply,
    Job,
)

__all__ = ["controller"]


def health() -> HealthReply:
    return HealthReply(
        status="ok", version="0.9.0", uptime_s=1.0, state="memory", instances=1, chunks=0,
        problems=[],
    )  # fmt: skip


def test_the_next_controller_is_asked_when_one_is_away(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.on("GET", "/v1/pins", {"pins": []})
    away = "http://127.0.0.1:1"
    assert lmc("pins", "--controller", away, "--controller", controller.url).exit_code == 0
    for written in (f"{away}, {controller.url}", f"['{away}', {controller.url}]"):
        monkeypatch.setenv("LMCACHE_CONTROLLERS", written)
        assert lmc("pins").exit_code == 0
    assert len(controller.asked) == 3


def test_what_was_asked_twice_has_one_idempotency_key(controller: FakeController) -> None:
    with served(FakeController()) as dying:
        dying.on("POST", "/v1/clear", DROPPED)
        controller.on("POST", "/v1/clear", says(job(), 202))
        both = ["--controller", dying.url, "--controller", controller.url]
        assert lmc(*CLEAR, *both).exit_code == 0
        [first] = {asked.key for asked in dying.asked_for("POST", "/v1/clear")}
        [second] = {asked.key for asked in controller.asked_for("POST", "/v1/clear")}
        assert first == second != ""
    assert lmc(*CLEAR).exit_code == 0
    keys = {asked.key for asked in controller.asked_for("POST", "/v1/clear")}
    assert len(keys) == 2, "another command is another operation"


def test_a_job_is_watched_at_the_controller_that_is_left(controller: FakeController) -> None:
    with served(FakeController()) as dying:
        dying.on("POST", "/v1/clear", says(job("running"), 202, Connection="close"))
        dying.on("GET", "/v1/jobs/j1", DROPPED)
        controller.on("GET", "/v1/jobs/j1", job())
        result = lmc(*CLEAR, "--controller", dying.url, "--controller", controller.url)
    assert (result.exit_code, result.stdout.split(",")[0]) == (0, "job j1: clear done")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_controller_is_asked_again_after_what_it_says(
    controller: FakeController, status: int
) -> None:
    slept: list[float] = []
    controller.on("POST", "/v1/clear", refuses(status, "busy", Retry_After="7"), says(job(), 202))
    link = fleet_link.ControllerLink(controller.url, token="t")
    fleet = fleet_link.Fleet([link], sleep=slept.append)
    assert fleet.post("/v1/clear", None, Job).value == job()
    fleet.close()
    assert slept == [7.0]
    assert len({asked.key for asked in controller.asked}) == 1


def test_a_controller_that_is_busy_for_long_is_not_waited_for(controller: FakeController) -> None:
    busy = refuses(503, "store_down", "the store is away", "", Retry_After="3600")
    controller.on("GET", "/v1/health", busy)
    result = lmc("status")
    assert result.exit_code == 3 and len(controller.asked) == 1
    assert result.stderr == ("error: the store is away\nhint: it is busy: try again in 3600 s\n")


def test_controllers_that_stay_busy_are_left_in_bounded_time(controller: FakeController) -> None:
    now = [0.0]
    controller.on("GET", "/v1/health", refuses(503, "busy", Retry_After="9"))

    def sleep(seconds: float) -> None:
        now[0] += seconds

    link = fleet_link.ControllerLink(controller.url, token="t")
    fleet = fleet_link.Fleet([link], sleep=sleep, now_s=lambda: now[0])
    with pytest.raises(fleet_link.BackendUnavailable):
        fleet.get("/v1/health", HealthReply)
    fleet.close()
    assert now[0] <= fleet_link.PATIENCE_S


@pytest.mark.parametrize(
    ("answer", "code", "said", "hint"),
    [
        (Says(200, b"<html>hello"), 3, "is not understood", "of the same version"),
        (Says(200, b""), 3, "is not understood", "of the same version"),
        (Says(200, b'{"status":"great"}'), 3, "is not understood", "of the same version"),
        (Says(200, b"\xff\xfe"), 3, "is not understood", "of the same version"),
        (says(None, 204), 3, "is not understood", "of the same version"),
        (Says(502, b"<html>bad gateway"), 3, "answered 502, without a reason", "in front of one"),
        (Says(302, b"", {"Location": "http://elsewhere"}), 3, "answered 302", "in front of one"),
        (Says(401, b"who are you"), 3, "answered 401", "--token-file"),
        (refuses(401, "token", "no token", ""), 2, "no token", "--token-file"),
        (refuses(403, "token", "not this token", ""), 2, "not this token", "the operators' one"),
        (
            refuses(409, "ambiguous", "which model?", "llama, qwen"),
            2,
            "which model?",
            "llama, qwen",
        ),
        (refuses(413, "too_large", "too large", ""), 2, "too large", "fewer tokens"),
        (refuses(421, "host", "not here", ""), 2, "not here", "--allow-host"),
        (refuses(422, "invalid", "what?", "select"), 2, "what?", "select"),
        (refuses(429, "busy", "slow down", "", Retry_After="99"), 3, "slow down", "in 99 s"),
        (refuses(500, "internal", "oh no", "look at its log"), 3, "oh no", "look at its log"),
        (refuses(504, "timeout", "no tokenizer", ""), 3, "no tokenizer", "lmc status"),
        (refuses(409, "x", "bad \x1b[31mname\n" * 999, ""), 2, r"bad \x1b[31mname\n", "lmc status"),
    ],
)
def test_a_bad_answer_is_one_clear_line_and_a_hint(
    controller: FakeController, answer: Says, code: int, said: str, hint: str
) -> None:
    controller.on("GET", "/v1/health", answer)
    result = lmc("status", "--json")
    assert (result.exit_code, result.stdout) == (code, "")
    error, advice = result.stderr.splitlines()
    assert error.startswith("error: ") and said in error and len(error) < 2000
    assert advice.startswith("hint: ") and hint in advice


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (["--controller", "ftp://c:1"], "is no address of a controller", "http://127.0.0.1:9300"),
        (["--controller", "http://me:hunter2@c"], "has no user", "http://127.0.0.1:9300"),
        (["--controller", "https://c", "--ca-file", "/nonexistent"], "has no certificates", ""),
        (["--token-file", "/nonexistent"], "can't be read", "lmc token"),
        (
            [f"--controller=http://c:{port}" for port in range(1, 18)],
            "17 controllers",
            "at most 16",
        ),
    ],
)
def test_a_wrong_connection_is_exit_2(
    controller: FakeController, options: list[str], said: str, hint: str
) -> None:
    result = lmc("status", *options)
    assert result.exit_code == 2 and said in result.stderr and hint in result.stderr
    assert "hunter2" not in result.output


def test_a_token_file_of_others_or_of_odd_characters_is_refused(
    controller: FakeController, tmp_path: Path
) -> None:
    file = tmp_path / "t"
    file.write_text("0123456789abcdef\r\nX-Evil: 1\n")
    file.chmod(0o644)
    assert "others can read the token file" in lmc("status", "--token-file", str(file)).stderr
    file.chmod(0o600)
    result = lmc("status", "--token-file", str(file))
    assert result.exit_code == 2 and "characters that no token has" in result.stderr
    assert not controller.asked


def test_the_token_is_found_where_the_controller_keeps_it(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LMCACHE_CONTROLLER_TOKEN_FILE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "lmcache-core").mkdir()
    file = tmp_path / "lmcache-core" / "controller.token"
    file.write_text("fedcba9876543210" * 2)
    file.chmod(0o600)
    controller.on("GET", "/v1/pins", {"pins": []})
    assert lmc("pins").exit_code == 0
    assert controller.asked[0].headers["authorization"] == "Bearer " + "fedcba9876543210" * 2


def test_the_controller_that_answered_is_asked_first(controller: FakeController) -> None:
    with served(FakeController()) as away:
        away.on("GET", "/v1/health", DROPPED)
        controller.on("GET", "/v1/health", health())
        links = [fleet_link.ControllerLink(c.url, token="t") for c in (away, controller)]
        fleet = fleet_link.Fleet(links)
        for _ in range(3):
            assert fleet.get("/v1/health", HealthReply).value == health()
        fleet.close()
        assert (len(away.asked), len(controller.asked)) == (1, 3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files of a certificate that nobody signed, for 127.0.0.1, and of its key."""
    base = tmp_path_factory.mktemp("tls")
    made = [base / "cert.pem", base / "key.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(made[0]), "-keyout", str(made[1])]
    subprocess.run(command, check=True, capture_output=True)
    return str(made[0]), str(made[1])


def test_tls_is_checked_against_the_ca_file(
    controller: FakeController, certificate: tuple[str, str]
) -> None:
    with served(FakeController(), certificate=certificate) as secure:
        secure.on("GET", "/v1/pins", {"pins": []})
        assert secure.url.startswith("https://")
        trusted = lmc("pins", "--controller", secure.url, "--ca-file", certificate[0])
        assert trusted.exit_code == 0, trusted.stderr
        strange = lmc("pins", "--controller", secure.url)
        assert strange.exit_code == 3 and "hint: --ca-file names" in strange.stderr
        assert len(secure.asked) == 1
