"""``lmc backends`` and ``lmc doctor``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lmcache_core import plugins
from lmcache_core.cli.app import app
from lmcache_core.sdk import ConfigError, Probe

run = CliRunner().invoke


def test_backends_lists_what_is_installed_as_json() -> None:
    result = run(app, ["backends", "--json"])
    rows = {row["scheme"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert rows["file"]["usable"] and "durability=process" in rows["file"]["capabilities"]
    assert rows["memory"]["package"] == "lmcache-core"
    assert all(row["reason"] for row in rows.values())


def test_doctor_passes_here_and_fails_for_a_missing_directory() -> None:
    good = run(app, ["doctor", "--json", "--dir", "/tmp"])
    bad = run(app, ["doctor", "--json", "--dir", "/nonexistent"])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    failed = [row for row in json.loads(bad.stdout) if row["state"] == "fail"]
    assert [row["check"] for row in failed] == ["disk"]
    assert all(row["hint"] for row in failed)


def doctor_rows() -> dict[str, Any]:
    return {row["check"]: row for row in json.loads(run(app, ["doctor", "--json"]).stdout)}


def test_doctor_says_of_each_backend_what_it_lacks_and_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = plugins.installed()["file"]
    lacking = Probe(usable=False, reason="libx is missing", hint="apt-get install libx")
    monkeypatch.setattr(plugins, "installed", lambda *found: {"file": here})
    monkeypatch.setattr(plugins, "probe", lambda url: lacking)
    rows = doctor_rows()
    assert rows["file://"] == {
        "check": "file://",
        "state": "warn",
        "found": "libx is missing",
        "hint": "apt-get install libx",
    }
    absent = {check: row["hint"] for check, row in rows.items() if row["state"] == "absent"}
    assert absent["mooncake://"] == "pip install 'lmcache-backend-mooncake[cpu]'"
    assert absent["gds://"] == "pip install lmcache-backend-gds"
    assert absent["nixl+obj://"] == "pip install 'lmcache-backend-nixl[obj]'"
    assert [check for check in absent if "redis+cluster://" in check], "one row for the package"


def test_doctor_fails_for_a_broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scheme: str) -> plugins.Backend:
        raise ConfigError("it can't be imported", hint="pip install -U it")

    monkeypatch.setattr(plugins, "load", broken)
    row = doctor_rows()["file://"]
    assert (row["state"], row["found"], row["hint"]) == (
        "fail", "it can't be imported", "pip install -U it",
    )  # fmt: skip


def test_tables_show_commands_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras look like markup to the table, and a narrow screen must not cut them."""
    monkeypatch.setattr(plugins, "installed", lambda: {})
    monkeypatch.setenv("COLUMNS", "60")
    shown = "".join(run(app, ["doctor"]).stdout.split("\n"))
    words = "".join(c for c in shown if c not in "│ ")
    assert "[cpu]" in words and "…" not in words


def test_help_shows_examples() -> None:
    for command in ("backends", "doctor"):
        assert f"lmc {command} --" in run(app, [command, "--help"]).stdout.replace("\n", " ")
