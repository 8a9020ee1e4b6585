"""A certificate says what came of every planned check, and an edited one is found out."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from lmcache_conformance import Outcome, Profile, certificate, waivers
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.frame import Check, Result, plan
from lmcache_core.sdk import Capabilities, ConfigError

PLAN = plan(CHECKS, full=False)
TODAY = datetime.date(2026, 6, 1)


def results(changed: dict[str, Outcome] | None = None) -> list[Result]:
    changed = changed or {}

    def one(check: Check) -> Result:
        outcome = changed.get(check.id, Outcome.PASS)
        reason = "" if outcome is Outcome.PASS else "because"
        return Result(id=check.id, outcome=outcome, seconds=0.1, seed=1, reason=reason)

    return [one(check) for check in PLAN]


def make(changed: dict[str, Outcome] | None = None) -> certificate.Certificate:
    return certificate.make(
        backend="third", full=False, plan=PLAN, results=results(changed),
        capabilities=Capabilities(), distribution="lmcache-core", server="third 1.0",
    )  # fmt: skip


def of(profile: Profile) -> list[str]:
    return [each.id for each in PLAN if each.profile is profile]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["PASS", "PASS", "PASS", "PASS"]),
        ({"B1": Outcome.FAIL}, ["FAIL", "FAIL", "FAIL", "FAIL"]),
        ({"B1": Outcome.WAIVED, "B8": Outcome.NOT_CLAIMED}, ["PASS"] * 4),
        ({"H1": Outcome.FAIL}, ["PASS", "FAIL", "PASS", "PASS"]),
        ({"H1": Outcome.INCONCLUSIVE}, ["PASS", "INCONCLUSIVE", "PASS", "PASS"]),
        ({"H1": Outcome.INCONCLUSIVE, "H4": Outcome.FAIL}, ["PASS", "FAIL", "PASS", "PASS"]),
        (
            dict.fromkeys(of(Profile.DIRECT), Outcome.NOT_CLAIMED),
            ["PASS", "PASS", "PASS", "NOT_CLAIMED"],
        ),
        (
            {**dict.fromkeys(of(Profile.DURABLE), Outcome.NOT_CLAIMED), "B1": Outcome.FAIL},
            ["FAIL", "FAIL", "NOT_CLAIMED", "FAIL"],
        ),
        ({"P1": Outcome.FAIL}, ["PASS"] * 4),
    ],
)
def test_profiles_follow_from_the_checks(changed: dict[str, Outcome], words: list[str]) -> None:
    assert list(make(changed).profiles.values()) == words


def test_a_run_that_lacks_a_check_has_no_certificate() -> None:
    with pytest.raises(ConfigError, match="were planned"):
        certificate.make(
            backend="third", full=False, plan=PLAN, results=results()[:-1],
            capabilities=None, distribution="", server="",
        )  # fmt: skip


def test_it_is_written_in_four_forms_and_read_again(tmp_path: Path) -> None:
    made = make({"H1": Outcome.FAIL, "J3": Outcome.NOT_CLAIMED})
    path = certificate.write(made, tmp_path)
    assert certificate.read(path) == made
    assert certificate.faults_of(certificate.read(path), CHECKS) == []
    assert made.versions["record_sha256"] or made.versions["distribution"] == "lmcache-core"
    junit = ElementTree.parse(tmp_path / "third.junit.xml").getroot()
    assert (junit.get("tests"), junit.get("failures"), junit.get("skipped")) == (
        str(len(PLAN)), "1", "0",
    )  # fmt: skip
    assert json.loads((tmp_path / "third.badge.json").read_text())["message"].startswith("core")
    assert "| third |" in (tmp_path / "third.md").read_text()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("profiles", "core"), "FAIL", "profiles say"),
        (("totals", "PASS"), 1, "totals say"),
        (("planned",), 3, "were planned"),
        (("checks", 0, "outcome"), "GOOD", "no known outcome"),
        (("checks", 0, "outcome"), "FAIL", "none of its reasons"),
        (("checks", 0, "profile"), "report", "counts for"),
        (("checks", 0, "id"), "A2", "not those"),
    ],
)
def test_what_does_not_add_up_is_named(
    path: tuple[str | int, ...], value: object, words: str
) -> None:
    plain = msgspec.to_builtins(make())
    at = plain
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    edited = msgspec.convert(plain, certificate.Certificate)
    assert any(words in line for line in certificate.faults_of(edited, CHECKS))


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 7}'])
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no certificate"):
        certificate.read(path)


def waiver(ends: str = "2026-12-31") -> dict[str, waivers.Waiver]:
    date = datetime.date.fromisoformat(ends)
    return {"H6": waivers.Waiver(id="H6", reason="known", link="https://x", expires=date)}


@pytest.mark.parametrize(
    ("found", "ends", "counts"),
    [
        (Outcome.FAIL, "2026-12-31", Outcome.WAIVED),
        (Outcome.PASS, "2026-12-31", Outcome.FAIL),
        (Outcome.FAIL, "2026-05-31", Outcome.FAIL),
        (Outcome.FAIL, "2026-06-01", Outcome.WAIVED),
        (Outcome.NOT_CLAIMED, "2026-12-31", Outcome.NOT_CLAIMED),
    ],
)
def test_a_waiver_counts_for_a_failure_until_it_ends(
    found: Outcome, ends: str, counts: Outcome
) -> None:
    result = Result(id="H6", outcome=found, seconds=0, seed=0, reason="r")
    assert waivers.apply(result, waiver(ends), TODAY).outcome is counts
    other = replace(result, id="H5")
    assert waivers.apply(other, waiver(ends), TODAY) is other


def test_waivers_are_read_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / waivers.FILE
    assert waivers.load(path, ["H6"]) == {}
    path.write_text(
        '[[waiver]]\nid = "H6"\nreason = "known"\nlink = "https://x"\nexpires = 2026-12-31\n'
    )
    assert waivers.load(path, ["H6"]) == waiver()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[waiver]", "kv-waivers.toml"),
        ('[[waiver]]\nid = "H6"\nreason = "known"\nlink = "x"\n', "a waiver has"),
        ('[[waiver]]\nid="H6"\nreason="r"\nlink="x"\nexpires="soon"\n', "a waiver has"),
        ('[[waiver]]\nid="Q1"\nreason="r"\nlink="x"\nexpires=2026-12-31\n', "Q1"),
        ('[[waiver]]\nid="H6"\nreason=" "\nlink="x"\nexpires=2026-12-31\n', "say why"),
        ('[other]\nid="H6"\n', "unknown tables"),
    ],
)
def test_a_wrong_waiver_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / waivers.FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        waivers.load(path, ["H6"])
