"""Real servers, one for the whole run where a test does not harm it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis_support import Open, connect

from lmcache_backend_redis.connector import RedisConnector
from lmcache_backend_redis.server import RedisServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens connectors, which are closed at the end."""
    live: list[RedisConnector] = []

    def open_one(url: str, *args: Any, **options: Any) -> RedisConnector:
        live.append(connect(url, *args, **options))
        return live[-1]

    yield open_one
    for connector in live:
        connector.close()
