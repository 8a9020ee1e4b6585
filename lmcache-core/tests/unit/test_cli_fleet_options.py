"""Which chunks the options of ``lmc``'s fleet commands mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_fleet_rig import KEY, FakeController, controller, job, lmc, says
from typer.testing import Result

from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller.messages import ClearRequest, Selection

__all__ = ["controller"]
SALT = "acme-salt"
ACME = tenant_id(SALT)


def clear(
    controller: FakeController, *options: str, stdin: str | None = None
) -> tuple[Result, Selection | None]:
    controller.on("POST", "/v1/clear", says(job(), 202))
    result = lmc("clear", "--yes", *options, stdin=stdin)
    sent = controller.asked_for("POST", "/v1/clear")
    if not sent:
        return result, None
    return result, msgspec.json.decode(sent[-1].body, type=ClearRequest).select


@pytest.mark.parametrize("text", ["[1, 2, 4294967295]", "1 2\n4294967295\n", " [1,2,4294967295]\n"])
def test_tokens_come_from_a_file_or_stdin(
    controller: FakeController, tmp_path: Path, text: str
) -> None:
    (tmp_path / "ids").write_text(text)
    wanted = Selection(tokens=[1, 2, 4294967295])
    assert clear(controller, "--tokens", str(tmp_path / "ids"))[1] == wanted
    assert clear(controller, "--tokens", "-", stdin=text)[1] == wanted


def test_text_comes_from_the_line_a_file_or_stdin(
    controller: FakeController, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("You are…\n")
    assert clear(controller, "--text", "hello")[1] == Selection(text="hello")
    assert clear(controller, "--text", f"@{tmp_path / 'prompt'}")[1] == Selection(text="You are…\n")
    assert clear(controller, "--text", "@-", stdin="hi")[1] == Selection(text="hi")


def test_keys_come_from_the_line_a_file_or_stdin(
    controller: FakeController, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n{KEY}\n")
    two = Selection(keys=[KEY, KEY])
    assert clear(controller, "--keys", f"{KEY},{KEY}")[1] == two
    assert clear(controller, "--keys", f"@{tmp_path / 'keys'}")[1] == two


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--all"], {"all": True}),
        (["--model", "llama"], {"model": "llama"}),
        (["--tenant", ""], {"tenant": ""}),
        (["--tenant", SALT], {"tenant_id": ACME}),
        (["--tenant-id", ACME, "--model", "llama"], {"tenant_id": ACME, "model": "llama"}),
        (["--text", "x", "--tenant", SALT], {"text": "x", "tenant": SALT}),
        (["--text", "x", "--lora", "ab12"], {"text": "x", "lora": "ab12"}),
    ],
)
def test_what_options_mean(
    controller: FakeController, options: list[str], wanted: dict[str, Any]
) -> None:
    assert clear(controller, *options)[1] == Selection(**wanted)


def test_a_salt_travels_only_where_a_prefix_needs_it(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "salt").write_text(SALT + "\n")
    file = ["--tenant-file", str(tmp_path / "salt")]
    assert clear(controller, *file)[1] == Selection(tenant_id=ACME)
    assert clear(controller, *file, "--text", "x")[1] == Selection(text="x", tenant=SALT)
    monkeypatch.setenv("LMCACHE_TENANT", SALT)
    assert clear(controller, "--model", "llama")[1] == Selection(model="llama", tenant_id=ACME)
    assert clear(controller, "--tenant-id", "0" * 16)[1] == Selection(tenant_id="0" * 16)
    assert clear(controller, "--keys", KEY)[1] == Selection(keys=[KEY])


def test_everything_of_everybody_is_not_meant_while_a_tenant_is_set(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_TENANT", SALT)
    result, sent = clear(controller, "--all")
    assert (result.exit_code, sent) == (2, None) and "--all has no --model" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "which chunks?"),
        (["--text", "x", "--all"], "--text and --all at once"),
        (["--text", "x", "--keys", KEY], "--text and --keys at once"),
        (["--all", "--model", "m"], "--all has no --model and no tenant"),
        (["--keys", KEY, "--tenant", SALT], "--keys has no --model and no tenant"),
        (["--tenant", SALT, "--tenant-file", "f"], "--tenant and --tenant-file"),
        (["--tenant", SALT, "--tenant-id", ACME], "a tenant and --tenant-id"),
        (["--text", "x", "--tenant-id", ACME], "needs the tenant's salt"),
        (["--model", "m", "--lora", "ab"], "--lora is for prefixes"),
        (["--tenant-id", "xyz"], "$.tenant_id"),
        (["--keys", "abc"], "$.keys[0]"),
        (["--text", "x", "--instance", "not ok"], "$.instances[0]"),
        (["--tokens", "/nonexistent"], "can't be read"),
        (["--tenant-file", "/nonexistent"], "can't be read"),
        (["--model", "m" * 2000], "$.model"),
    ],
)
def test_what_can_not_be_meant_is_exit_2_and_not_sent(
    controller: FakeController, options: list[str], said: str
) -> None:
    result, sent = clear(controller, *options)
    assert (result.exit_code, sent) == (2, None)
    assert said in result.stderr and SALT not in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "stdin is empty"),
        ("one two", "not token ids"),
        ("[1, 2", "not token ids"),
        ("[" * 100_000, "not token ids"),
        ("9" * 5000, "not token ids"),
        ("[[1]]", "$.tokens[0]"),
        ("[-1]", "$.tokens[0]"),
        ("[1.5]", "$.tokens[0]"),
        ("4294967296", "$.tokens[0]"),
        ("[]", "length >= 1"),
        (" ".join(["1"] * ((1 << 20) + 1)), "length <= 1048576"),
        ("1 " * (9 << 20), "larger than 16 MiB"),
    ],
    ids=[
        "empty",
        "words",
        "half",
        "deep",
        "long",
        "nested",
        "negative",
        "fraction",
        "large",
        "none",
        "many",
        "huge",
    ],
)
def test_bad_token_ids_are_refused_here(controller: FakeController, text: str, said: str) -> None:
    result, sent = clear(controller, "--tokens", "-", stdin=text)
    assert (result.exit_code, sent) == (2, None)
    assert said in result.stderr and len(result.stderr) < 500


@pytest.mark.parametrize("wrong", ["e0", "e0/", "/host", "e 0/host", "e0/ho st", ""])
def test_a_place_is_an_instance_and_a_tier(controller: FakeController, wrong: str) -> None:
    for line in ([wrong, "e1/host"], ["e0/host", wrong]):
        result = lmc("move", *line, "--all")
        assert result.exit_code == 2 and result.stderr.startswith("error: ")
    assert not controller.asked


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["lookup", "--model", "m"], "which prefix?"),
        (["jobs", "--wait"], "which job?"),
        (["jobs", "--cancel"], "which job?"),
        (["quota", "--bytes", "1GiB"], "whose limit?"),
        (["quota", "--bytes", "lots", "--tenant", "a"], "not a size"),
        (["quota", "--bytes", "1GiB", "--remove", "q1"], "--bytes and --remove"),
        (["quota", "--tenant", "a"], "no limit"),
        (["pin", "--all"], "which prefix?"),
        (["pin", "--text", "x", "--ttl-s", "0"], "$.ttl_s"),
        (["pin", "--text", "x", "--owner", "not ok"], "$.owner"),
    ],
)
def test_a_wrong_command_line_is_exit_2(
    controller: FakeController, line: list[str], said: str
) -> None:
    result = lmc(*line)
    assert result.exit_code == 2 and said in result.stderr
    assert not controller.asked
