"""A master behind sentinels that dies, or is told to step down, under a connector."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis_support import get, open_url, put

from lmcache_backend_redis.fleets import RedisSentinels
from lmcache_conformance import value
from lmcache_core.sdk import BackendUnavailable, RemoteConnector, Status


@pytest.fixture
def fleet() -> Iterator[RedisSentinels]:
    with RedisSentinels() as found:
        yield found


def until_it_takes(store: RemoteConnector, limit_s: float = 20.0) -> float:
    """Put until that is OK; the longest that one call took in s."""
    end_s, longest_s = time.monotonic() + limit_s, 0.0
    while True:
        started_s = time.monotonic()
        assert started_s < end_s, "no new master is found"
        try:
            status = put(store, b"after", value(2, 5000), 3)  # type: ignore[arg-type]
        except BackendUnavailable as error:
            assert error.hint
            status = Status.FAILED
        longest_s = max(longest_s, time.monotonic() - started_s)
        if status is Status.OK:
            return longest_s
        time.sleep(0.1)


def test_a_killed_master_is_followed_by_its_replica(fleet: RedisSentinels) -> None:
    store = open_url(fleet.url)
    assert store.capabilities.evicts, "a failover may lose what was acknowledged last"
    assert put(store, b"before", value(1, 5000)) is Status.OK
    assert fleet.replicated()
    fleet.servers[0].kill()
    assert until_it_takes(store) < 2.0
    assert fleet.master() == 1
    assert get(store, b"before", 5000)[1] == value(1, 5000)
    fleet.servers[0].start()
    time.sleep(0.5)
    assert put(store, b"last", value(3, 5000)) is Status.OK
    store.close()


def test_a_master_that_steps_down_is_left(fleet: RedisSentinels) -> None:
    """Its connections stay open: it says READONLY, and the next ones go to the new master."""
    store = open_url(fleet.url)
    assert put(store, b"before", value(1, 5000)) is Status.OK
    assert fleet.replicated()
    fleet.sentinel().execute_command("SENTINEL FAILOVER", "kv")
    end_s = time.monotonic() + 15
    while fleet.master() != 1:
        assert time.monotonic() < end_s
        time.sleep(0.1)
    until_it_takes(store)
    assert get(store, b"before", 5000)[1] == value(1, 5000)
    assert get(store, b"after", 5000)[1] == value(2, 5000)
    store.close()


def test_sentinels_that_are_gone_matter_to_new_connections_only(fleet: RedisSentinels) -> None:
    store = open_url(fleet.url)
    assert put(store, b"k", value(1, 5000)) is Status.OK
    fleet.kill_sentinels()
    assert get(store, b"k", 5000)[1] == value(1, 5000)
    with pytest.raises(BackendUnavailable, match="no sentinel knows"):
        open_url(fleet.url)
    store.close()


def test_a_name_that_no_sentinel_knows(fleet: RedisSentinels) -> None:
    with pytest.raises(BackendUnavailable, match="does not know it") as caught:
        open_url(fleet.url.replace("/kv", "/other"))
    assert "is NAME monitored there" in caught.value.hint
