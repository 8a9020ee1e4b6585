"""``lmc codec``: what is listed, what a report is asked for, and what is wrong with the asking."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toy_codecs import Rounding, Toy, holding
from typer.testing import CliRunner

from lmcache_core.cli import codec as cli
from lmcache_core.cli.app import app
from lmcache_core.codecs.registry import Codecs
from lmcache_core.quality import Choice, Plan, choices
from lmcache_core.quality.plan import read_text
from lmcache_core.sdk import ConfigError

run = CliRunner().invoke


def installed(monkeypatch: pytest.MonkeyPatch, codecs: Codecs) -> None:
    monkeypatch.setattr(cli, "Codecs", lambda: codecs)


class Lacking(Toy):
    """Whole, but its library is not there."""

    def prepare(self) -> None:
        raise ConfigError("toy needs libtoy", hint="pip install 'toy[lib]'")


def test_list_shows_levels_bounds_and_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, holding(Rounding(), Toy()))
    result = run(app, ["codec", "list", "--json"])
    rounding, toy = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (rounding["codec"], rounding["lossless"], rounding["usable"]) == (
        "rounding",
        False,
        True,
    )
    assert (rounding["levels"], rounding["default_level"]) == (["low", "high"], "low")
    assert rounding["max_error"] == {"low": 0.1, "high": 0.2}
    assert (toy["codec"], toy["lossless"], toy["levels"]) == ("toy", True, [])
    shown = run(app, ["codec", "list"], env={"COLUMNS": "120"}).stdout
    assert "low* (<= 0.1), high (<= 0.2)" in shown


def test_list_names_the_command_that_installs_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, holding(Lacking()))
    result = run(app, ["codec", "list", "--json"])
    (row,) = json.loads(result.stdout)
    assert result.exit_code == 0, "a codec that lacks something is not broken"
    assert (row["usable"], row["broken"]) == (False, False)
    assert (row["reason"], row["hint"]) == ("toy needs libtoy", "pip install 'toy[lib]'")


@pytest.mark.parametrize("wrong", [lambda: 3, lambda: 1 / 0])
def test_list_fails_for_a_broken_codec(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    installed(monkeypatch, holding(("odd", wrong)))  # type: ignore[arg-type]
    result = run(app, ["codec", "list", "--json"])
    (row,) = json.loads(result.stdout)
    assert result.exit_code == 1
    assert row["broken"] and not row["usable"] and "odd" in row["reason"] and row["hint"]


def test_list_finds_the_codecs_of_this_package() -> None:
    rows = {row["codec"]: row for row in json.loads(run(app, ["codec", "list", "--json"]).stdout)}
    assert rows["zstd"]["lossless"] and not rows["cachegen"]["lossless"]
    assert set(rows["cachegen"]["max_error"]) == set(rows["cachegen"]["levels"])
    assert all(row["usable"] or "pip install" in row["hint"] for row in rows.values())


def test_a_report_measures_every_level_of_every_codec_that_works() -> None:
    found, skipped = choices([], holding(Rounding(), Lacking()))
    assert found == [Choice("rounding", "low"), Choice("rounding", "high")]
    assert [name for name, _ in skipped] == ["toy"]
    assert choices(["toy"], holding(Toy()))[0] == [Choice("toy", "")]


def test_a_report_measures_what_is_named_once() -> None:
    found, _ = choices(["rounding:high", "rounding"], holding(Rounding(), Toy()))
    assert found == [Choice("rounding", "high"), Choice("rounding", "low")]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("roundin", "did you mean 'rounding'?"),
        ("rounding:extreme", "its levels are low, high"),
        ("rounding:", "its levels are low, high"),
        ("toy", "lmc codec list"),
    ],
)
def test_a_codec_that_was_named_must_be_there(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as failed:
        choices([word], holding(Rounding(), Lacking()))
    assert said in failed.value.hint


def test_a_report_needs_at_least_one_codec() -> None:
    with pytest.raises(ConfigError, match="no codec can be used here"):
        choices([], holding(Lacking()))


@pytest.mark.parametrize("module", ["torch", "transformers", "matplotlib"])
def test_a_report_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run(app, ["codec", "report", "somewhere"])
    assert result.exit_code == 2 and not result.stdout
    assert "hint: pip install 'lmcache-core[report]'" in result.stderr


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--context", "1000"], "--context 1024"),
        (["--block", "100"], "--block 256"),
        (["--windows", "0"], ""),
        (["--predicted", "0"], ""),
    ],
)
def test_sizes_of_a_report_fit_each_other(options: list[str], hint: str) -> None:
    result = run(app, ["codec", "report", "somewhere", *options])
    assert result.exit_code == 2 and "error: " in result.stderr
    assert hint in result.stderr


def test_a_report_says_before_it_measures_that_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(app, ["codec", "report", "somewhere", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "is not a directory" in result.stderr


def test_the_text_that_ships_is_prose_with_its_source_beside_it() -> None:
    text, name = read_text(None)
    assert len(text.split()) >= 12_000
    notice = Path(cli.__file__).parents[1] / "quality" / name.replace(".txt", ".NOTICE.txt")
    assert "public domain" in notice.read_text(encoding="utf-8")


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "x.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent", binary):
        with pytest.raises(ConfigError, match=file.name):
            read_text(file)


def test_a_plan_counts_the_token_that_is_only_predicted() -> None:
    assert Plan(model="m", context_tokens=512, predicted_tokens=64).window_tokens == 577


def test_help_shows_examples() -> None:
    for command in ("list", "report"):
        assert "Examples:" in run(app, ["codec", command, "--help"]).stdout
