"""The contract's judge, over system calls, O_DIRECT and kvikio."""

from __future__ import annotations

import pytest
from gds_support import needs_kvikio

from lmcache_backend_gds.conformance import GdsDirectHarness, GdsHarness, GdsKvikioHarness
from lmcache_conformance import ConnectorConformance

pytestmark = pytest.mark.conformance


class TestPosix(ConnectorConformance):
    harness = GdsHarness()


class TestDirect(ConnectorConformance):
    harness = GdsDirectHarness()


@needs_kvikio
class TestKvikio(ConnectorConformance):
    harness = GdsKvikioHarness()
