"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import redis

from lmcache_backend_redis.fleets import RedisCluster, RedisSentinels
from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.server import RedisServer
from lmcache_conformance import Harness, TcpHarness

_WHOLE = ("--appendonly", "yes")


class RedisHarness(TcpHarness):
    """A real server over TCP, with an append-only file."""

    name = "redis"
    arguments: tuple[str, ...] = _WHOLE

    def start(self, scratch: Path) -> None:
        self.server = RedisServer(arguments=self.arguments)
        self._small: RedisServer | None = None
        super().start(scratch)

    def stop(self) -> None:
        super().stop()
        self.server.close()
        if self._small is not None:
            self._small.close()

    def address(self) -> tuple[str, int] | Path:
        return ("127.0.0.1", self.server.port)

    def url_at(self, host: str, port: int) -> str:
        return f"redis://{host}:{port}/0"

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.start()

    def small_url(self, size_bytes: int) -> str:
        if self._small is None:
            limit = ("--maxmemory", str(size_bytes), "--maxmemory-policy", "noeviction")
            self._small = RedisServer(arguments=limit)
        return self._small.url

    def bad_urls(self) -> list[str]:
        return [
            "redis://127.0.0.1:1/0",
            f"redis://127.0.0.1:{self.server.port}/first",
            f"redis://:wrong@127.0.0.1:{self.server.port}/99",
        ]

    def litter(self) -> None:
        with self._client() as client:
            for name in ("other", "lmc:{zz}", "lmc:{6}", "lmc:{61", "lmc:{61}:x:0"):
                client.set(name, b"no value")
            client.set(b"lmc:{62}", b"no head")

    def corrupt(self, key: bytes) -> None:
        with self._client() as client:
            piece = self._head(client, key).names(key)[0]
            middle = int(client.strlen(piece)) // 2
            byte = self._value(client, piece)[middle : middle + 1]
            client.setrange(piece, middle, bytes([byte[0] ^ 0x10]))

    def truncate(self, key: bytes) -> None:
        with self._client() as client:
            piece = self._head(client, key).names(key)[-1]
            client.set(piece, self._value(client, piece)[:-5])

    def raw_get(self, key: bytes) -> bytes | None:
        with self._client() as client:
            if not client.exists(head_name(key)):
                return None
            names = self._head(client, key).names(key)
            return b"".join(self._value(client, name) for name in names)

    def server_version(self) -> str:
        with self._client() as client:
            return f"redis {client.info('server')['redis_version']}"

    def _client(self) -> redis.Redis:
        return redis.Redis(port=self.server.port)

    def _value(self, client: redis.Redis, name: bytes) -> bytes:
        found = client.get(name)
        return found if isinstance(found, bytes) else b""

    def _head(self, client: redis.Redis, key: bytes) -> Head:
        head = Head.decode(self._value(client, head_name(key)))
        assert head is not None, "the key is not there"
        return head


class RedisUnixHarness(RedisHarness):
    """The same server over its unix socket; the fault proxy is not in between."""

    name = "redis-unix"

    def url(self) -> str:
        return self.server.unix_url


class RedisClusterHarness(Harness):
    """Three nodes; faults hit all of them at once."""

    name = "redis-cluster"

    def start(self, scratch: Path) -> None:
        super().start(scratch)
        self.fleet = RedisCluster(replica=False, arguments=_WHOLE)

    def stop(self) -> None:
        self.fleet.close()

    def url(self) -> str:
        return self.fleet.url

    def bad_urls(self) -> list[str]:
        return ["redis+cluster://127.0.0.1:1", f"{self.fleet.url}/3"]

    def kill(self) -> None:
        for node in self.fleet.nodes:
            node.kill()

    def restart(self) -> None:
        for node in self.fleet.nodes:
            node.start()
        self.fleet.wait_until_well()

    def stall(self) -> AbstractContextManager[None]:
        return _frozen(self.fleet.nodes)


class RedisSentinelHarness(Harness):
    """A master, its replica and three sentinels."""

    name = "redis-sentinel"

    def start(self, scratch: Path) -> None:
        super().start(scratch)
        self.fleet = RedisSentinels()

    def stop(self) -> None:
        self.fleet.close()

    def url(self) -> str:
        return self.fleet.url

    def bad_urls(self) -> list[str]:
        return ["redis+sentinel://127.0.0.1:1/kv", self.fleet.url.rpartition("/")[0]]

    def stall(self) -> AbstractContextManager[None]:
        return _frozen(self.fleet.servers)


@contextmanager
def _frozen(servers: list[RedisServer]) -> Iterator[None]:
    for server in servers:
        server.freeze()
    try:
        yield
    finally:
        for server in servers:
            server.resume()
