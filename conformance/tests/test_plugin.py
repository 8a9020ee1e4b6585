"""The suite under pytest: outcomes are shown, and no check gets lost without a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
from lmcache_conformance import ConnectorConformance
from lmcache_conformance.builtin import MemoryHarness

class TestMine(ConnectorConformance):
    harness = MemoryHarness()
"""
SOME = ("-k", "test_b1_ or test_b2_")


def pytest_on(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.slow
def test_a_whole_run_writes_a_certificate_and_shows_every_outcome(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, GOOD, "--kv-report", "out", "--kv-seed", "5")
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert found["profiles"] == {
        "core": "PASS", "resilient": "PASS", "durable": "NOT_CLAIMED", "direct": "NOT_CLAIMED",
    }  # fmt: skip
    assert {check["seed"] for check in found["checks"]} == {5}
    assert "not_claimed" in done.stdout
    assert "resilient  PASS" in done.stdout


def test_deselected_checks_fail_the_run(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, GOOD, *SOME)
    assert done.returncode == 1
    assert "no certificate" in done.stdout
    assert "2 answered" in done.stdout


def test_an_overridden_check_fails_the_run(tmp_path: Path) -> None:
    text = GOOD + "    def test_b1_round_trip(self):\n        pass\n"
    done = pytest_on(tmp_path, text)
    assert done.returncode != 0
    assert "overrides test_b1_round_trip" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "trick",
    [
        "TestMine.test_b1_round_trip = None",
        "import pytest; TestMine.test_b1_round_trip = pytest.mark.skip('later')(\n"
        "    lambda self, kv_judge: None)",
    ],
    ids=["deleted", "skipped"],
)
def test_a_check_taken_away_later_fails_the_run(tmp_path: Path, trick: str) -> None:
    done = pytest_on(tmp_path, f"{GOOD}\n{trick}\n")
    assert "failed" not in done.stdout.splitlines()[-1]
    assert done.returncode == 1
    assert "no certificate" in done.stdout


def test_a_failure_says_rule_finding_fix_and_seed(tmp_path: Path) -> None:
    text = GOOD.replace("MemoryHarness()", "Mine()").replace(
        "class TestMine",
        "class Mine(MemoryHarness):\n    module = 'wrong_plugin'\n"
        "    def url(self):\n        return 'wrong://'\n\nclass TestMine",
    )
    (tmp_path / "wrong_plugin.py").write_text(
        "from lmcache_core.sdk import *\n"
        "from lmcache_core.connectors.memory import MemoryConnector\n"
        "class Wrong(MemoryConnector):\n"
        "    def delete_one(self, key, timeout_s): pass\n"
        "@hookimpl\n"
        "def lmcache_backend_info():\n"
        "    return BackendInfo(name='wrong', version='1', schemes=('wrong',),\n"
        "                       api_min=(0, 9), api_tested=(0, 9))\n"
        "@hookimpl\n"
        "def lmcache_probe(url, options): return Probe(usable=True, reason='x')\n"
        "@hookimpl\n"
        "def lmcache_open_connector(url, options, host): return Wrong()\n"
    )
    done = pytest_on(tmp_path, text, "-k", "test_b4_", "--kv-seed", "11")
    assert "B4 A deleted key is absent" in done.stdout
    assert "found: after a delete: get_into answered OK, due is MISS" in done.stdout
    assert "fix:   delete must be visible" in done.stdout
    assert "seed:  11" in done.stdout


def test_the_packaged_run_asks_for_a_backend(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "", "--pyargs", "lmcache_conformance", "-x", *SOME)
    assert done.returncode != 0
    assert "--kv-backend=NAME" in done.stdout
    done = pytest_on(
        tmp_path, "", "--pyargs", "lmcache_conformance", "-x", *SOME, "--kv-backend", "nobody"
    )
    assert "no harness is called 'nobody'" in done.stdout


def test_the_packaged_run_judges_an_installed_backend(tmp_path: Path) -> None:
    done = pytest_on(
        tmp_path, "", "--pyargs", "lmcache_conformance", *SOME, "--kv-backend", "memory"
    )
    assert "2 passed" in done.stdout, done.stdout
    done = pytest_on(
        tmp_path, "", "--pyargs", "lmcache_conformance", *SOME, "--kv-backend=file",
        f"--kv-url=file://{tmp_path}/kv",
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout


def test_a_run_without_the_suite_is_left_alone(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, "def test_a(): pass\n")
    assert done.returncode == 0
    assert "conformance" not in done.stdout


def test_a_module_that_can_not_be_collected_is_an_error_not_a_crash(tmp_path: Path) -> None:
    done = pytest_on(tmp_path, GOOD + "\nimport no_such_module\n")
    assert done.returncode == 2
    assert "No module named 'no_such_module'" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr and "Traceback" not in done.stderr
