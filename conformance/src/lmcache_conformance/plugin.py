"""The pytest plugin: options, the five outcomes, the plan's count, certificates.

It does nothing in a run without a subclass of `ConnectorConformance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.sdk import ConfigError

_RUNS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
_LETTERS = {"NOT_CLAIMED": "n", "INCONCLUSIVE": "?", "WAIVED": "w"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--kv-*``."""
    group = parser.getgroup("lmcache conformance")
    group.addoption("--kv-backend", metavar="NAME", help="backend to judge, by its harness's name")
    group.addoption("--kv-url", metavar="URL", help="judge the store at URL instead")
    group.addoption(
        "--kv-profile", choices=("quick", "full"), default="quick", help="plan (default: quick)"
    )
    group.addoption("--kv-report", metavar="DIR", help="write certificates there")
    group.addoption("--kv-seed", type=int, metavar="N", help="of everything random")
    group.addoption(
        "--kv-waivers", metavar="FILE", default="kv-waivers.toml", help="known failures"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is imported before the options are known to matter."""
    config.stash[_RUNS] = {}


@pytest.fixture(scope="class")
def kv_judge(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The class's `Judge`; checks that its plan was carried out when the class ends."""
    from lmcache_conformance import certificate, waivers
    from lmcache_conformance.checks import CHECKS
    from lmcache_conformance.judge import Judge

    config = request.config
    known = [each.id for each in CHECKS]
    made = Judge(
        request.cls.harness,
        full=config.getoption("--kv-profile") == "full",
        waived=waivers.load(Path(config.getoption("--kv-waivers")), known),
        seed=config.getoption("--kv-seed"),
    )
    run = config.stash[_RUNS].setdefault(request.cls.__qualname__, {})
    run["judge"] = made
    yield made
    try:
        run["certificate"] = made.certificate()
    except ConfigError as error:
        run["error"] = error.message
    finally:
        made.close()
    folder = config.getoption("--kv-report")
    if folder and "certificate" in run:
        run["path"] = certificate.write(run["certificate"], Path(folder))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember which classes must carry out a plan, also when their every test is deselected."""
    from lmcache_conformance.suite import ConnectorConformance

    for item in session.items:
        cls = getattr(item, "cls", None)
        if cls is not None and issubclass(cls, ConnectorConformance):
            session.config.stash[_RUNS].setdefault(cls.__qualname__, {})


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show the outcome that is neither PASS nor FAIL by its name."""
    # A report of collection has no properties.
    said = dict(getattr(report, "user_properties", ())).get("kv_outcome")
    if report.when == "call" and report.passed and said in _LETTERS:
        return str(said).lower(), _LETTERS[str(said)], str(said)
    return None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A plan that was not carried out fails the run."""
    runs = session.config.stash[_RUNS].values()
    if session.exitstatus == pytest.ExitCode.OK and any("certificate" not in r for r in runs):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Profiles, reasons and plans."""
    for name, run in config.stash[_RUNS].items():
        terminalreporter.section(f"lmcache conformance: {name}")
        found = run.get("certificate")
        if found is None:
            why = run.get("error", "no check ran")
            terminalreporter.write_line(
                f"no certificate: {why} (a run of single checks has none)", red=True
            )
            continue
        for check in found.checks:
            if check.reason and check.profile != "report":
                terminalreporter.write_line(f"{check.id:4} {check.outcome:13} {check.reason}")
        for profile, word in found.profiles.items():
            terminalreporter.write_line(f"{profile:10} {word}")
        if "path" in run:
            terminalreporter.write_line(f"certificate: {run['path']}")
