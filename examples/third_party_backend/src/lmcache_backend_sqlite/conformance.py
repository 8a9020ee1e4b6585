"""What the conformance suite needs to judge this backend."""

from lmcache_conformance import Harness


class SqliteHarness(Harness):
    name = "sqlite"

    def url(self) -> str:
        return f"sqlite://{self.scratch}/kv.db"
