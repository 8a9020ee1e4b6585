"""Core's own connectors, judged like any other."""

from __future__ import annotations

from lmcache_conformance import ConnectorConformance
from lmcache_conformance.builtin import FileHarness, MemoryHarness, SyncedFileHarness


class TestMemory(ConnectorConformance):
    harness = MemoryHarness()


class TestFile(ConnectorConformance):
    harness = FileHarness()


class TestSyncedFile(ConnectorConformance):
    harness = SyncedFileHarness()
