"""``pytest --pyargs lmcache_conformance --kv-backend=NAME``: the checks of one backend."""

from __future__ import annotations

import pytest

from lmcache_conformance.judge import find, harnesses
from lmcache_conformance.suite import ConnectorConformance
from lmcache_core.sdk import ConfigError


class TestBackend(ConnectorConformance):
    """The backend that the command line names."""

    @pytest.fixture(scope="class", autouse=True)
    def kv_named(self, request: pytest.FixtureRequest) -> None:
        """Find its harness before the judge asks for it."""
        name = request.config.getoption("--kv-backend")
        if not name:
            raise pytest.UsageError(f"give --kv-backend=NAME; installed: {sorted(harnesses())}")
        try:
            request.cls.harness = find(name, request.config.getoption("--kv-url") or "")
        except ConfigError as error:
            raise pytest.UsageError(str(error)) from error
