"""The certificate: what was judged, by what, and what came of it.

``verify`` recomputes from the checks everything that is derived from them, so an edited file is
found out; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from lmcache_conformance.frame import Check, Outcome, Profile, Result
from lmcache_core.sdk import API_VERSION, Capabilities, ConfigError

SCHEMA = "lmcache-conformance/1"
PROFILES = (Profile.CORE, Profile.RESILIENT, Profile.DURABLE, Profile.DIRECT)
_GOOD = {Outcome.PASS, Outcome.WAIVED, Outcome.NOT_CLAIMED}


class CheckEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One check of a certificate; ``profile`` is what it counts for."""

    id: str
    profile: str
    outcome: str
    seconds: float
    seed: int
    reason: str
    figures: dict[str, float]


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """See `SCHEMA`."""

    schema: str
    backend: str
    plan: str
    planned: int
    versions: dict[str, str]
    machine: dict[str, str]
    capabilities: dict[str, Any]
    profiles: dict[str, str]
    totals: dict[str, int]
    checks: list[CheckEntry]


def verdicts(entries: Iterable[CheckEntry]) -> dict[str, str]:
    """Each profile's word, from its checks and those of ``core``."""
    by_profile: dict[str, list[Outcome]] = {profile.value: [] for profile in Profile}
    for entry in entries:
        by_profile[entry.profile].append(Outcome(entry.outcome))
    core = _word(by_profile[Profile.CORE.value], claimable=False)
    found = {Profile.CORE.value: core.value}
    for profile in PROFILES[1:]:
        own = _word(by_profile[profile.value], claimable=profile is not Profile.RESILIENT)
        if own is Outcome.PASS and core is not Outcome.PASS:
            own = core
        found[profile.value] = own.value
    return found


def _word(outcomes: Sequence[Outcome], *, claimable: bool) -> Outcome:
    if not outcomes or Outcome.INCONCLUSIVE in outcomes or Outcome.FAIL in outcomes:
        return Outcome.FAIL if Outcome.FAIL in outcomes else Outcome.INCONCLUSIVE
    if claimable and Outcome.PASS not in outcomes and Outcome.WAIVED not in outcomes:
        return Outcome.NOT_CLAIMED
    return Outcome.PASS


def make(
    *,
    backend: str,
    full: bool,
    plan: Sequence[Check],
    results: Sequence[Result],
    capabilities: Capabilities | None,
    distribution: str,
    server: str,
) -> Certificate:
    """A certificate of a whole run.

    Raises:
        ConfigError: the results are not one for each planned check.
    """
    if [each.id for each in plan] != [each.id for each in results]:
        raise ConfigError(
            f"{len(plan)} checks were planned, {len(results)} answered",
            hint="a check was deleted, overridden, skipped or deselected",
        )
    entries = [
        CheckEntry(
            id=result.id,
            profile=check.profile.value,
            outcome=result.outcome.value,
            seconds=result.seconds,
            seed=result.seed,
            reason=result.reason,
            figures=result.figures or {},
        )
        for check, result in zip(plan, results)
    ]
    return Certificate(
        schema=SCHEMA,
        backend=backend,
        plan="full" if full else "quick",
        planned=len(plan),
        versions=_versions(distribution, server),
        machine={
            "system": platform.platform(),
            "cpu": platform.machine(),
            "cores": str(os.cpu_count()),
            "python": platform.python_version(),
        },
        capabilities=_plain(capabilities),
        profiles=verdicts(entries),
        totals=_totals(entries),
        checks=entries,
    )


def read(path: Path) -> Certificate:
    """
    Raises:
        ConfigError: no certificate of this schema.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Certificate)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no certificate: {error}") from error
    if found.schema != SCHEMA:
        raise ConfigError(f"{path} has schema {found.schema!r}, this suite reads {SCHEMA!r}")
    return found


def faults_of(found: Certificate, known: Sequence[Check]) -> list[str]:
    """What does not add up; empty when all does."""
    wrong = []
    plan = [each for each in known if found.plan == "full" or not each.full_only]
    ids = [entry.id for entry in found.checks]
    if found.versions.get("suite") == suite_version():
        if ids != [each.id for each in plan]:
            missing = sorted({each.id for each in plan} - set(ids))
            wrong.append(f"the checks are not those of this suite's {found.plan} plan: {missing}")
        profiles = {each.id: each.profile.value for each in known}
        wrong += [
            f"{entry.id} counts for {entry.profile}, due is {profiles[entry.id]}"
            for entry in found.checks
            if profiles.get(entry.id, entry.profile) != entry.profile
        ]
    if len(set(ids)) != len(ids) or found.planned != len(ids):
        wrong.append(f"{found.planned} checks were planned, {len(set(ids))} answered")
    bad = [e.id for e in found.checks if e.outcome not in set(Outcome) or (
        e.outcome != Outcome.PASS and not e.reason)]  # fmt: skip
    if bad:
        wrong.append(f"no known outcome, or none of its reasons: {', '.join(bad)}")
        return wrong
    if verdicts(found.checks) != found.profiles:
        wrong.append(f"profiles say {found.profiles}, the checks make {verdicts(found.checks)}")
    if _totals(found.checks) != found.totals:
        wrong.append(f"totals say {found.totals}, the checks make {_totals(found.checks)}")
    return wrong


def write(found: Certificate, folder: Path) -> Path:
    """``NAME.json``, ``.junit.xml``, ``.md`` and ``.badge.json`` in ``folder``; the first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.backend}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    (folder / f"{found.backend}.junit.xml").write_bytes(_junit(found))
    (folder / f"{found.backend}.md").write_text(row(found) + "\n")
    (folder / f"{found.backend}.badge.json").write_text(json.dumps(_badge(found)) + "\n")
    return path


HEADER = (
    "| backend | version | core | resilient | durable | direct | plan | checks |\n"
    + "|---" * 8
    + "|"
)


def row(found: Certificate) -> str:
    """One row below `HEADER`."""
    words = " | ".join(found.profiles[profile.value] for profile in PROFILES)
    version = found.versions.get("backend", "")
    passed = found.totals.get(Outcome.PASS.value, 0)
    return f"| {found.backend} | {version} | {words} | {found.plan} | {passed} of {found.planned} |"


def suite_version() -> str:
    """Of this distribution."""
    return metadata.version("lmcache-conformance")


def _badge(found: Certificate) -> dict[str, Any]:
    """An endpoint badge, as shields.io reads it."""
    passed = [name for name, word in found.profiles.items() if word == Outcome.PASS.value]
    return {
        "schemaVersion": 1,
        "label": "lmcache conformance",
        "message": " + ".join(passed) or "not certified",
        "color": "brightgreen" if passed else "red",
    }


def _junit(found: Certificate) -> bytes:
    suite = ElementTree.Element(
        "testsuite",
        name=f"lmcache-conformance {found.backend}",
        tests=str(len(found.checks)),
        failures=str(found.totals.get(Outcome.FAIL.value, 0)),
        skipped="0",
        time=f"{sum(each.seconds for each in found.checks):.3f}",
    )
    for each in found.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=found.backend, name=each.id, time=f"{each.seconds:.3f}"
        )
        if each.outcome == Outcome.FAIL.value:
            ElementTree.SubElement(case, "failure", message=each.reason)
        elif each.reason:
            ElementTree.SubElement(case, "system-out").text = f"{each.outcome}: {each.reason}"
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def _totals(entries: Iterable[CheckEntry]) -> dict[str, int]:
    count = Counter(entry.outcome for entry in entries)
    return {outcome.value: count.get(outcome.value, 0) for outcome in Outcome}


def _versions(distribution: str, server: str) -> dict[str, str]:
    found = {
        "contract": ".".join(map(str, API_VERSION)),
        "suite": suite_version(),
        "core": metadata.version("lmcache-core"),
        "server": server,
    }
    try:
        dist = metadata.distribution(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return {**found, "backend": "", "distribution": "", "record_sha256": ""}
    record = dist.read_text("RECORD") or ""
    return {
        **found,
        "backend": dist.version,
        "distribution": dist.name,
        "record_sha256": hashlib.sha256(record.encode()).hexdigest() if record else "",
    }


def _plain(capabilities: Capabilities | None) -> dict[str, Any]:
    if capabilities is None:
        return {}

    def simple(value: Any) -> Any:
        if isinstance(value, frozenset):
            return sorted(each.value for each in value)
        return getattr(value, "value", value)

    fields: Mapping[str, Any] = type(capabilities).__dataclass_fields__
    return {name: simple(getattr(capabilities, name)) for name in fields}
