"""``lmc`` and a controller, with instances that do as they are told."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_fleet_rig import lmc
from controller_rig import TOKEN, FakeInstance, Rig, keys_of, model, prompt, rig

from lmcache_core.agent import wire
from lmcache_core.controller import messages

SERVED = model("llama")
TOKENS = json.dumps(prompt(3))


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Rig]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    monkeypatch.setenv("LMCACHE_CONTROLLER_TOKEN_FILE", str(token))
    monkeypatch.delenv("LMCACHE_TENANT", raising=False)
    with rig() as made:
        monkeypatch.setenv("LMCACHE_CONTROLLERS", made.url)
        yield made


@contextlib.contextmanager
def working(*instances: FakeInstance) -> Iterator[None]:
    """``instances`` carry out what they are owed, until the end."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.01):
            for instance in instances:
                instance.obey()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def said(kind: Any, *line: str) -> Any:
    result = lmc(*line, "--json", stdin=TOKENS)
    assert (result.exit_code, result.stderr) == (0, "")
    return msgspec.json.decode(result.stdout, type=kind)


def test_every_command_and_a_controller_understand_each_other(fleet: Rig) -> None:
    keys = keys_of(SERVED, prompt(3))
    note = wire.NamespaceNote(tag=SERVED.tag, base=SERVED.tag)
    both = [
        fleet.instance(name, models=(SERVED,), notes=(note,), status={"channel": f"tcp://{name}:1"})
        for name in ("e0", "e1")
    ]
    for instance in both:
        instance.sync()
    both[0].stores("host", keys)
    with working(*both):
        assert said(messages.HealthReply, "status").chunks == 3
        assert [one.name for one in said(messages.Instances, "instances").instances] == ["e0", "e1"]
        assert said(messages.Instance, "instances", "e0").models == ["llama"]
        found = said(messages.LookupReply, "lookup", "--tokens", "-")
        assert [(one.instance, one.chunks) for one in found.instances] == [("e0", 3)]
        listed = ",".join(found.keys)

        pin = said(messages.Pin, "pin", "--keys", listed, "--owner", "ci")
        assert [one.id for one in said(messages.Pins, "pins").pins] == [pin.id]
        assert said(messages.Job, "unpin", pin.id).state == "done"

        copied = said(messages.Job, "copy", "e0/host", "e0/disk", "--tokens", "-")
        assert (copied.state, both[0].held["disk"]) == ("done", set(keys))
        moved = said(messages.Job, "move", "e0/host", "e1/host", "--model", "llama")
        assert (moved.state, both[0].held["host"]) == ("done", set())
        assert both[1].held["host"] == set(keys)
        for line in (["compress", "disk", "--codec", "zstd"], ["decompress", "disk"]):
            assert said(messages.Job, *line, "--model", "llama").state == "done"
        assert said(messages.Job, "jobs", moved.id).id == moved.id
        assert len(said(messages.Jobs, "jobs", "--state", "done").jobs) >= 6

        limit = said(messages.Quota, "quota", "--bytes", "1GiB", "--tenant", "acme")
        assert said(messages.Quotas, "quota").quotas == [limit]
        assert said(None, "quota", "--remove", limit.id) is None
        said(messages.UsageReply, "usage", "--instance", "e0", "--tier", "disk")
        said(messages.Prefixes, "prefixes")

        cleared = said(messages.Job, "clear", "--all", "--yes")
        assert (cleared.state, both[0].held["disk"], both[1].held["host"]) == ("done", set(), set())


@pytest.mark.parametrize(
    "line",
    [
        ["lookup", "--text", "x"],
        ["move", "e0/host", "nobody/host", "--all"],
        ["misses", "no/such/request"],
        ["unpin", "no/such/pin"],
        ["clear", "--yes", "--tenant", "acme"],
        ["jobs", "--state", "strange"],
    ],
    ids=" ".join,
)
def test_what_a_controller_refuses_is_exit_2_with_its_words(fleet: Rig, line: list[str]) -> None:
    result = lmc(*line)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


def test_a_wrong_token_is_exit_2(fleet: Rig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("0" * 32)
    other.chmod(0o600)
    result = lmc("status", "--token-file", str(other))
    assert result.exit_code == 2 and "token" in result.stderr
