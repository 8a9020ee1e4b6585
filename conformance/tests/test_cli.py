"""``lmcache-conformance``: judge, verify, compare, start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_conformance import certificate
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.cli import app
from lmcache_conformance.scaffold import reference, write
from lmcache_core.sdk import ConfigError

RUN = CliRunner()
ROOT = Path(__file__).parents[2]


def test_single_checks_run_without_a_certificate(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["run", "memory", "--only", "b1,B2", "--report", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nobody"], "installed are"),
        (["run", "memory", "--only", "Q9"], "Q9"),
        (["verify", "/nowhere.json"], "no certificate"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments: list[str], words: str) -> None:
    done = RUN.invoke(app, arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_a_run_gives_a_certificate_that_verifies(tmp_path: Path) -> None:
    done = RUN.invoke(app, ["run", "memory", "--report", str(tmp_path), "--require", "resilient"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "memory.json"
    assert RUN.invoke(app, ["verify", str(path)]).exit_code == 0
    table = RUN.invoke(app, ["matrix", str(path), str(tmp_path / "memory.badge.json")]).output
    assert table.splitlines()[0] == certificate.HEADER.splitlines()[0]
    assert "| memory |" in table
    edited = json.loads(path.read_text())
    edited["profiles"]["durable"] = "PASS"
    path.write_text(json.dumps(edited))
    done = RUN.invoke(app, ["verify", str(path)])
    assert done.exit_code == 1
    assert "profiles say" in done.output


def test_a_new_backend_has_every_file_and_its_name(tmp_path: Path) -> None:
    made = write("mystore", tmp_path / "new")
    texts = {str(path.relative_to(tmp_path / "new")): path.read_text() for path in made}
    assert "src/lmcache_backend_mystore/__init__.py" in texts
    assert 'mystore = "lmcache_backend_mystore"' in texts["pyproject.toml"]
    assert not any("@name@" in text or "NAME" in path for path, text in texts.items())
    with pytest.raises(ConfigError, match="not empty"):
        write("mystore", tmp_path / "new")
    with pytest.raises(ConfigError, match="no name"):
        write("My-Store", tmp_path / "other")


def test_the_reference_page_is_of_these_checks() -> None:
    page = (ROOT / "docs" / "conformance.md").read_text()
    assert reference() in page, "run: lmcache-conformance checks --markdown"
    assert all(f"| {check.id} |" in page for check in CHECKS)
