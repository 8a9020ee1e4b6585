"""The contract's judge."""

from __future__ import annotations

import pytest

from lmcache_backend_mooncake.conformance import MooncakeHarness
from lmcache_conformance import ConnectorConformance

pytestmark = pytest.mark.conformance


class TestMooncake(ConnectorConformance):
    harness = MooncakeHarness()
