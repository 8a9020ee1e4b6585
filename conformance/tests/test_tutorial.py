"""The tutorial shows the code that is judged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tutorial_shows_the_example_s_code() -> None:
    command = [sys.executable, str(ROOT / "tools" / "tutorial.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_its_connector_is_about_forty_lines() -> None:
    text = (
        ROOT / "examples/third_party_backend/src/lmcache_backend_sqlite/__init__.py"
    ).read_text()
    body = text[text.index("class ") : text.index("@sdk.hookimpl")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 50
