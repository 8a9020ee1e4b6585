"""``lmc backends`` and ``lmc doctor``."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from lmcache_core.cli.app import app

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


def test_help_shows_examples() -> None:
    for command in ("backends", "doctor"):
        assert f"lmc {command} --" in run(app, [command, "--help"]).stdout.replace("\n", " ")
