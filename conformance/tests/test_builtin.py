"""Core's own connectors, judged like any other."""

from __future__ import annotations

import pytest

from lmcache_conformance import ConnectorConformance
from lmcache_conformance.builtin import FileHarness, MemoryHarness, SyncedFileHarness


class TestMemory(ConnectorConformance):
    harness = MemoryHarness()


@pytest.mark.conformance
class TestFile(ConnectorConformance):
    harness = FileHarness()


@pytest.mark.conformance
class TestSyncedFile(ConnectorConformance):
    harness = SyncedFileHarness()
