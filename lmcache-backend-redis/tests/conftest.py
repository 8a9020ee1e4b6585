"""Real servers, one for the whole run where a test does not harm it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmcache_backend_redis.server import RedisServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server
