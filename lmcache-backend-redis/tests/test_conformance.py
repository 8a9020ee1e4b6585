"""The contract's judge, over TCP and over a unix socket."""

from __future__ import annotations

import pytest

from lmcache_backend_redis.conformance import RedisHarness, RedisUnixHarness
from lmcache_conformance import ConnectorConformance

pytestmark = pytest.mark.conformance


class TestTcp(ConnectorConformance):
    harness = RedisHarness()


class TestUnix(ConnectorConformance):
    harness = RedisUnixHarness()
