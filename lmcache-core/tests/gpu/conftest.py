"""What did not run is said at the end, also when everything passed."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    here = "tests/gpu/"
    skipped = [r.nodeid for r in terminalreporter.stats.get("skipped", []) if here in r.nodeid]
    tests = Counter(name.split(here)[-1].split("[")[0] for name in skipped)
    if tests:
        terminalreporter.section("not run: needs a CUDA device or what is named below")
        for name, count in tests.items():
            terminalreporter.line(f"{name} ({count})" if count > 1 else name)
