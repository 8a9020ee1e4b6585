"""The contract's judge."""

from __future__ import annotations

import pytest

from lmcache_backend_infinistore.conformance import InfinistoreHarness
from lmcache_conformance import ConnectorConformance

pytestmark = pytest.mark.conformance


class TestInfinistore(ConnectorConformance):
    harness = InfinistoreHarness()
