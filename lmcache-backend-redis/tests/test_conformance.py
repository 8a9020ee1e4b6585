"""The contract's judge, over a unix socket and over TCP."""

from __future__ import annotations

from lmcache_backend_redis.conformance import RedisHarness
from lmcache_conformance import ConnectorConformance


class TcpHarness(RedisHarness):
    url_attribute = "url"


class TestUnix(ConnectorConformance):
    harness = RedisHarness


class TestTcp(ConnectorConformance):
    harness = TcpHarness
