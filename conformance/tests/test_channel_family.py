"""The channel family judges itself: the right channel passes, each wrong one is found by the check
that is meant for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner
from wrong_channels import WRONG, Right

from lmcache_conformance import ChannelConformance
from lmcache_conformance.channels import CHANNEL_CHECKS, Source, judge_channel
from lmcache_conformance.channels.checks import moving
from lmcache_conformance.cli import app
from lmcache_core.sdk import handshake

URL = "tcp://127.0.0.1"
SLOW = {"T8", "T9", "T13", "T14", "T15", "T16", "T17"}
"""Their wrong channels take seconds each."""


def params() -> list[Any]:
    return [
        pytest.param(each, id=each.__name__, marks=[pytest.mark.slow] * (each.kills in SLOW))
        for each in WRONG
    ]


@pytest.mark.parametrize("wrong", params())
def test_a_wrong_channel_is_found_by_the_check_that_is_meant(
    wrong: type[Right], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wrong.patches.items():
        monkeypatch.setattr(handshake, name, value)
    only = [check for check in CHANNEL_CHECKS if check.id == wrong.kills]
    found = judge_channel(Source(URL, wrong.spec()), quick=True, seed=1, checks=only)
    assert found.verdict == "FAIL", wrong.__doc__


def test_there_is_a_wrong_one_for_every_check() -> None:
    assert {wrong.kills for wrong in WRONG} == {check.id for check in CHANNEL_CHECKS}
    assert len(WRONG) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_right_channel_passes(seed: int) -> None:
    found = judge_channel(Source(URL, Right.spec()), quick=True, seed=seed)
    bad = {each["id"]: each["reason"] for each in found.checks if each["outcome"] != "PASS"}
    assert bad == {}
    assert found.verdict == "PASS"
    assert found.capabilities["guarded"] is True
    assert [each["id"] for each in found.checks] == [f"T{n}" for n in range(1, 20)]


class TestRight(ChannelConformance):
    source = Source(URL, Right.spec())


for _name in [name for name in vars(ChannelConformance) if name.startswith("test_")]:
    # All of them run above; here only that a check is a test.
    if _name != f"test_t1_{moving.pieces_arrive.name}":
        setattr(TestRight, _name, None)


def test_a_check_can_not_be_overridden() -> None:
    with pytest.raises(TypeError, match="test_t1_pieces_arrive"):
        body = {"source": Source(URL), "test_t1_pieces_arrive": None}
        type("Cheating", (ChannelConformance,), body)


@pytest.mark.slow
def test_the_command_writes_a_certificate(tmp_path: Any) -> None:
    out = tmp_path / "tcp.json"
    options = ["--quick", "--seed", "1", "--out", str(out), "--option", "max_peers=8"]
    done = CliRunner().invoke(app, ["channel", "tcp", *options])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert written["verdict"] == "PASS"
    assert written["capabilities"]["max_peers"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["tcpp"], "tcp://?"), (["tcp", "--option", "max_peer=8"], "max_peers"),
     (["tcp", "--option", "x"], "NAME=VALUE")],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments: list[str], words: str, tmp_path: Any) -> None:
    done = CliRunner().invoke(app, ["channel", *arguments, "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output
