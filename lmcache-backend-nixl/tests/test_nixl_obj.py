"""nixl+obj against a real S3 service that dies, freezes and is meddled with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from nixl_support import get, open_url, put

from lmcache_backend_nixl.frame import HEADER_BYTES
from lmcache_backend_nixl.server import BUCKET, LOGIN, S3Server
from lmcache_conformance import Memory, value, within
from lmcache_conformance.rig import Host
from lmcache_core.sdk import BackendUnavailable, ConfigError, GetResult, Status

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as found:
        yield found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def store(server: S3Server, host: Host) -> Iterator[Any]:
    opened = open_url(server.url, host)
    yield opened
    opened.close()


def raw(server: S3Server) -> Any:
    return boto3.client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1",
        aws_access_key_id=LOGIN["access_key"], aws_secret_access_key=LOGIN["secret_key"],
    )  # fmt: skip


def test_a_value_is_one_object_that_says_its_size(server: S3Server, store: Any) -> None:
    assert put(store, [b"\0k"], 5000) == [Status.OK]
    data = raw(server).get_object(Bucket=BUCKET, Key="lmc/006b")["Body"].read()
    assert len(data) == HEADER_BYTES + 5000 and data[HEADER_BYTES:] == value(sum(b"\0k"), 5000)
    result, found = get(store, b"\0k", 20_000)
    assert (result, found) == (GetResult(Status.OK, 5000), value(sum(b"\0k"), 5000))
    assert get(store, b"\0k", 100)[0] == GetResult(Status.SIZE_MISMATCH, 5000)
    entries = [entry for entry in store.scan(b"\0", within(10)) if entry.key == b"\0k"]
    assert [entry.nbytes for entry in entries] == [5000]


def test_misses_and_hits_in_one_batch(store: Any) -> None:
    """The library fails the whole transfer when one object is absent."""
    assert put(store, [b"a", b"c"], 70_000) == [Status.OK] * 2
    memory = Memory([70_000] * 4)
    results = store.get_into([b"a", b"none", b"c", b"nil"], memory.buffers(), within(20))
    assert [r.status for r in results] == [Status.OK, Status.MISS, Status.OK, Status.MISS]
    assert memory.bytes_of(2) == value(sum(b"c"), 70_000)


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "foreign", "empty"])
def test_what_others_did_to_an_object_is_noticed(server: S3Server, store: Any, damage: str) -> None:
    key = b"d" + damage.encode()
    assert put(store, [key], 5000) == [Status.OK]
    assert get(store, key, 5000)[0].status is Status.OK, "and leaves its bytes in our memory"
    client, name = raw(server), f"lmc/{key.hex()}"
    data = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
    changed = {
        "cut": data[:-1],
        "longer": data[:8] + (6000).to_bytes(8, "little") + data[16:],
        "flipped": data[:4000] + bytes([data[4000] ^ 1]) + data[4001:],
        "foreign": b"somebody else's" * 1000,
        "empty": b"",
    }[damage]
    client.put_object(Bucket=BUCKET, Key=name, Body=changed)
    assert get(store, key, 8000)[0].status in (Status.CORRUPT, Status.FAILED)
    assert put(store, [key], 5000) == [Status.OK]
    assert get(store, key, 5000)[1] == value(sum(key), 5000)


def test_a_service_that_goes_and_comes_back(host: Host) -> None:
    """Left alone, the library would try for half a minute."""
    with S3Server() as server:
        store = open_url(server.url, host)
        assert put(store, [b"k"], MIB) == [Status.OK]
        server.kill()
        for _ in range(10):
            started_s = time.monotonic()
            with pytest.raises(BackendUnavailable, match="does not answer"):
                get(store, b"k", MIB, 5.0)
            assert time.monotonic() - started_s < 1, "it is tried for long"
        assert not store.health(within(5)).ok
        server.start()
        assert store.health(within(5)).ok
        assert put(store, [b"again"], MIB) == [Status.OK]
        assert get(store, b"again", MIB)[1] == value(sum(b"again"), MIB)
        started_s = time.monotonic()
        store.close()
        assert time.monotonic() - started_s < 5


def test_a_frozen_service_costs_the_deadline(host: Host) -> None:
    with S3Server() as server:
        store = open_url(server.url, host)
        assert put(store, [b"k"], MIB) == [Status.OK]
        server.freeze()
        memory = Memory([MIB])
        for act in (
            lambda: get(store, b"k", MIB, 0.4)[0].status,
            lambda: store.exists([b"k"], within(0.4))[0],
            lambda: put(store, [b"n"], MIB, 0.4)[0],
        ):
            started_s = time.monotonic()
            assert act() is Status.TIMED_OUT
            assert time.monotonic() - started_s < 0.65
        ticket = store.submit_get([b"k"], memory.buffers(first_token=3), within(0.3))
        time.sleep(0.35)
        assert store.poll(ticket) == [GetResult(Status.TIMED_OUT)], "its memory is core's again"
        server.resume()
        end_s = time.monotonic() + 15
        while not store.health(within(2)).ok:
            assert time.monotonic() < end_s
        assert get(store, b"k", MIB)[1] == value(sum(b"k"), MIB)
        assert host.released == []
        store.close()


def test_open_errors_name_the_fix_and_hide_the_login(server: S3Server, host: Host) -> None:
    with pytest.raises(ConfigError, match="'nothere' can't be used") as caught:
        open_url(server.url.replace(BUCKET, "nothere"), host)
    assert LOGIN["secret_key"] not in str(caught.value)
    with pytest.raises(BackendUnavailable, match="does not answer"):
        open_url(server.url.replace(str(server.port), "1"), host)
