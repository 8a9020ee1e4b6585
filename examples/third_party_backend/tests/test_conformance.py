from lmcache_backend_sqlite.conformance import SqliteHarness

from lmcache_conformance import ConnectorConformance


class TestSqlite(ConnectorConformance):
    harness = SqliteHarness()
