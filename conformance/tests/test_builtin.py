"""The built-in connectors, judged like any other."""

from __future__ import annotations

from lmcache_conformance import ConnectorConformance, Harness
from lmcache_core.connectors.file import FileConnector
from lmcache_core.connectors.memory import MemoryConnector


class MemoryHarness(Harness):
    def open(self) -> MemoryConnector:
        return MemoryConnector()


class FileHarness(Harness):
    def open(self) -> FileConnector:
        return FileConnector(str(self.scratch / "kv"))


class SyncedFileHarness(Harness):
    def open(self) -> FileConnector:
        return FileConnector(str(self.scratch / "kv"), durability="host")


class TestMemory(ConnectorConformance):
    harness = MemoryHarness


class TestFile(ConnectorConformance):
    harness = FileHarness


class TestSyncedFile(ConnectorConformance):
    harness = SyncedFileHarness
