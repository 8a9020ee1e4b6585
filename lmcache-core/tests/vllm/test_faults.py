"""Faults below host while vLLM serves: one clear error at start, or a counted miss.

Every answer equals the run without a cache; a request that waits pays at most one deadline,
and the next one is decided at once.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import Engine, cached, random_tokens

from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.server import RedisServer
from lmcache_conformance import FaultProxy
from lmcache_core.sdk import BackendUnavailable, ConfigError

pytestmark = pytest.mark.slow
Start = Callable[..., Engine]
DEADLINE_S = 0.5
PROMPTS = [random_tokens(seed, 700) for seed in range(41, 45)]
TOKENS = 6


@pytest.fixture(scope="module")
def reference(llama: Path) -> list[list[int]]:
    """What the engine says without a cache."""
    engine = Engine(llama, None)
    answers = engine.tokens(PROMPTS, TOKENS)
    engine.close()
    return answers


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(arguments=("--appendonly", "yes")) as server:
        yield server


def settings(url: str, **tier: Any) -> dict[str, Any]:
    lower = {"url": url, "name": "store", "deadline_s": DEADLINE_S, "probe_interval_s": 0.2, **tier}
    return {
        "chunk_size": 256,
        "lookup_deadline_s": DEADLINE_S,
        "tiers": [{"host": "128MiB"}, lower],
    }


class Watch:
    """How long the connector takes to decide each request, from its first question on."""

    def __init__(self, engine: Engine) -> None:
        self.seconds: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._ask = engine.connector.get_num_new_matched_tokens
        engine.connector.get_num_new_matched_tokens = self._asked

    def _asked(self, request: Any, computed: int) -> Any:
        start = time.monotonic()
        self._first.setdefault(request.request_id, start)
        answer = self._ask(request, computed)
        if answer[0] is not None:
            took = time.monotonic() - self._first[request.request_id]
            self.seconds.setdefault(request.request_id, took)
        return answer

    def last_s(self) -> float:
        return list(self.seconds.values())[-1]


def forget(engine: Engine) -> None:
    """Leave the chunks to the lower tier alone, and nothing known about what it lacks."""
    engine.settle()
    engine.cache.flush(5)
    engine.cache.host.drop(engine.cache.host.keys())


def count(engine: Engine, name: str) -> int:
    return int(engine.cache.metrics.snapshot().get(name, 0))


def ask(engine: Engine, index: int, reference: list[list[int]]) -> dict[str, int]:
    """One request; its text is the reference's.  Where its tokens came from."""
    (output,) = engine.run([PROMPTS[index]], TOKENS)
    assert list(output.outputs[0].token_ids) == reference[index], "another text than without cache"
    return cached(output)


def recovered(engine: Engine) -> None:
    """Wait as an idle engine would, then let it look once."""
    end_s = time.monotonic() + 10
    while not engine.cache.tiers.readable[0].available:
        assert time.monotonic() < end_s, "it does not recover"
        time.sleep(0.05)
        engine.cache.poll()


def test_killed_and_restarted(
    start: Start, llama: Path, server: RedisServer, reference: list[list[int]]
) -> None:
    engine = start(llama, settings(server.unix_url))
    watch = Watch(engine)
    ask(engine, 0, reference)
    forget(engine)
    assert ask(engine, 0, reference) == {"store": 512}
    forget(engine)
    server.kill()
    assert ask(engine, 0, reference) == {}
    assert watch.last_s() < DEADLINE_S + 0.3
    assert count(engine, "store.error.BackendUnavailable") >= 1
    assert count(engine, "store.breaker_opened") == 1
    assert count(engine, "miss.failed") + count(engine, "miss.deadline") >= 2
    for index in (1, 2):
        assert ask(engine, index, reference) == {}
        assert watch.last_s() < 0.005, "a request behind the breaker waited"
    assert count(engine, "miss.breaker") >= 4
    server.start()
    probes = count(engine, "store.probes")
    recovered(engine)
    assert count(engine, "store.probes") > probes, "it recovered without asking"
    forget(engine)
    assert ask(engine, 0, reference) == {"store": 512}, "what was acknowledged is lost"


def test_frozen_while_requests_wait(
    start: Start, llama: Path, server: RedisServer, reference: list[list[int]]
) -> None:
    engine = start(llama, settings(server.unix_url))
    watch = Watch(engine)
    engine.run(PROMPTS[:3], TOKENS)
    forget(engine)
    server.freeze()
    begun = time.monotonic()
    outputs = engine.run(PROMPTS[:3], TOKENS)
    assert [list(o.outputs[0].token_ids) for o in outputs] == reference[:3]
    assert max(list(watch.seconds.values())[-3:]) < DEADLINE_S + 0.3, "more than one deadline"
    assert time.monotonic() - begun < DEADLINE_S + 5
    assert ask(engine, 3, reference) == {}
    assert watch.last_s() < 0.005
    assert count(engine, "miss.deadline") >= 6
    server.resume()
    recovered(engine)
    forget(engine)
    assert ask(engine, 0, reference) == {"store": 512}


def test_full_without_eviction(start: Start, llama: Path, reference: list[list[int]]) -> None:
    limits = ("--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    with RedisServer(arguments=limits) as server:
        engine = start(llama, settings(server.unix_url))
        for index in range(4):
            ask(engine, index, reference)
        forget(engine)
        assert count(engine, "store.put.rejected") >= 1
        assert count(engine, "store.breaker_opened") == 0, "a full store is not a dead one"
        found = [ask(engine, index, reference) for index in range(4)]
        assert {"store": 512} in found and {} in found


def test_full_with_eviction(start: Start, llama: Path, reference: list[list[int]]) -> None:
    limits = ("--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru")
    with RedisServer(arguments=limits) as server:
        engine = start(llama, settings(server.unix_url, negative_ttl_s=0.0))
        for _ in range(2):
            for index in range(4):
                ask(engine, index, reference)
            forget(engine)
        assert count(engine, "store.put.rejected") == 0
        newest = ask(engine, 3, reference)
        assert newest in ({"store": 512}, {"store": 256}, {})
        raw = redis.Redis(unix_socket_path=str(server.socket_path))
        assert raw.info("stats")["evicted_keys"] > 0


def test_a_wrong_password_is_one_error_at_start(start: Start, llama: Path) -> None:
    with RedisServer(arguments=("--requirepass", "right")) as server:
        with pytest.raises(ConfigError, match="password"):
            start(llama, settings(f"{server.unix_url}?password=wrong-secret"))
        server.kill()
        with pytest.raises(BackendUnavailable, match="running"):
            start(llama, settings(server.url))


def test_slow(start: Start, llama: Path, server: RedisServer, reference: list[list[int]]) -> None:
    with FaultProxy(server.socket_path) as proxy:
        engine = start(llama, settings(f"redis://127.0.0.1:{proxy.port}"))
        watch = Watch(engine)
        ask(engine, 0, reference)
        forget(engine)
        proxy.faults.delay_s = 0.02
        ask(engine, 0, reference)
        assert watch.last_s() < DEADLINE_S + 0.3
        forget(engine)
        proxy.faults.delay_s, proxy.faults.bytes_per_s = 0.0, 1e6
        assert ask(engine, 0, reference) == {}
        assert watch.last_s() < DEADLINE_S + 0.3
        proxy.faults.bytes_per_s = 0.0
        recovered(engine)
        forget(engine)
        assert ask(engine, 0, reference) == {"store": 512}


@pytest.mark.parametrize("damage", ["flip", "cut", "head"])
def test_a_value_changed_behind_our_back(
    start: Start, llama: Path, server: RedisServer, reference: list[list[int]], damage: str
) -> None:
    engine = start(llama, settings(server.unix_url))
    ask(engine, 0, reference)
    forget(engine)
    raw = redis.Redis(unix_socket_path=str(server.socket_path))
    for name in raw.keys("lmc:*}"):
        key = bytes.fromhex(name[5:-1].decode())
        head = Head.decode(raw.get(name))
        assert head is not None and name == head_name(key)
        piece = head.names(key)[0]
        if damage == "flip":
            raw.setrange(piece, 50_000, bytes([raw.getrange(piece, 50_000, 50_000)[0] ^ 4]))
        elif damage == "cut":
            raw.set(piece, raw.get(piece)[:-5])
        else:
            raw.set(name, b"not a head")
    assert ask(engine, 0, reference) == {}
    assert count(engine, "store.corrupt") >= 1
    assert count(engine, "miss.corrupt") == 2
    forget(engine)
    assert ask(engine, 0, reference) == {"store": 512}, "the damaged value stands in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    room = tmp_path / "small"
    room.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(room)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.decode().strip()}")
    yield room
    subprocess.run(["umount", "-l", str(room)], check=True)


def test_a_full_disk(
    start: Start, llama: Path, small_disk: Path, reference: list[list[int]]
) -> None:
    engine = start(llama, settings(f"file://{small_disk}/kv", size="1GiB"))
    for index in range(4):
        ask(engine, index, reference)
    forget(engine)
    assert count(engine, "store.put.rejected") >= 1
    found = [ask(engine, index, reference) for index in range(4)]
    assert {"store": 512} in found or {"store": 256} in found
    assert all(sum(tokens.values()) in (0, 256, 512) for tokens in found)


def test_a_disk_that_fails(
    start: Start, llama: Path, tmp_path: Path, reference: list[list[int]]
) -> None:
    engine = start(llama, settings(f"file://{tmp_path}/kv"))
    watch = Watch(engine)
    ask(engine, 0, reference)
    forget(engine)
    ops = engine.cache.tiers.readable[0].connector._files.ops
    pread = ops.pread_into

    def fail(fd: int, view: memoryview, offset: int) -> int:
        raise OSError(5, os.strerror(5))

    ops.pread_into = fail
    assert ask(engine, 0, reference) == {}
    assert watch.last_s() < DEADLINE_S
    assert count(engine, "store.get.failed") >= 1
    assert count(engine, "store.corrupt") == 0, "an unclassified error says nothing of the value"
    ops.pread_into = pread
    recovered(engine)
    forget(engine)
    assert ask(engine, 0, reference) == {"store": 512}


def test_a_read_only_disk_is_one_error_at_start(
    start: Start, llama: Path, small_disk: Path, reference: list[list[int]]
) -> None:
    url = f"file://{small_disk}/kv"
    engine = start(llama, settings(url, size="2MiB"))
    ask(engine, 0, reference)
    engine.settle()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    forget(engine)
    ask(engine, 1, reference)
    forget(engine)
    assert count(engine, "store.put.failed") >= 1
    with pytest.raises(ConfigError, match="can't be used"):
        start(llama, settings(url))
