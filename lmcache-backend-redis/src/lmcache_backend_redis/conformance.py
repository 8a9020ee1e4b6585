"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

from pathlib import Path

from lmcache_backend_redis.connector import RedisConnector, server_facts
from lmcache_backend_redis.server import RedisServer
from lmcache_backend_redis.sessions import Sessions
from lmcache_conformance import Harness, within


class RedisHarness(Harness):
    """A real server on a unix socket, with an append-only file."""

    url_attribute = "unix_url"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.server = RedisServer(arguments=("--appendonly", "yes"))

    def open(self) -> RedisConnector:
        sessions = Sessions(getattr(self.server, self.url_attribute), {}, limit=8)
        facts = server_facts(sessions, within(5).deadline_s)
        return RedisConnector(sessions, facts, connections=8)

    def stop(self) -> None:
        self.server.close()
