"""NIXL 1.5.1 crashes when the interpreter takes UCX down, after everything is written; a run of
tests that has it loaded ends without that, with the same exit code."""

from __future__ import annotations

import atexit
import os
import sys

import pytest

_ENDED = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_ENDED] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if _ENDED in config.stash and any(name.startswith("nixl") for name in sys.modules):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_ENDED])
