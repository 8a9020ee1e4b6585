"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import redis

from lmcache_backend_redis.fleets import RedisCluster, RedisSentinels
from lmcache_backend_redis.layout import MAX_PIECES, Head, head_name
from lmcache_backend_redis.server import RedisServer
from lmcache_conformance import Harness, TcpHarness

_WHOLE = ("--appendonly", "yes", "--appendfsync", "no")
"""Without `everysec`, which may hold back a write for 2 s while a sync runs."""
DATABASE = 1
"""Not 0: so a new connection has to ask for it, and to wait for an answer."""
_COUNT = """
local n = 0
for _, name in ipairs(redis.call('KEYS', '*')) do
  if redis.call('PTTL', name) == -1 then n = n + 1 end
end
return n
"""
_READS = ("exists", "get", "scan", "health")
_WRITES = ("put", "delete")
_HANG_UP = "CLIENT KILL TYPE normal SKIPME yes"
REFUSALS: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "it asks for a login": (
        ("CONFIG SET requirepass secret", _HANG_UP), ("CONFIG SET requirepass \"\"",),
        ("open", *_READS, *_WRITES),
    ),
    "rights are taken away": (
        ("ACL SETUSER default -@all +acl +info",), ("ACL SETUSER default +@all",),
        (*_READS, *_WRITES),
    ),
    "it may be read only": (
        ("ACL SETUSER default -@write",), ("ACL SETUSER default +@all",), _WRITES,
    ),
    "it may only be written": (
        ("ACL SETUSER default -get -exists -scan",), ("ACL SETUSER default +@all",),
        ("exists", "get", "scan", "put", "delete"),
    ),
    "no transaction is allowed": (
        ("ACL SETUSER default -exec",), ("ACL SETUSER default +@all",), _WRITES,
    ),
    "replicas are missing": (
        ("CONFIG SET min-replicas-to-write 1",), ("CONFIG SET min-replicas-to-write 0",), _WRITES,
    ),
}  # fmt: skip
"""What to tell the server before and after, and the operations that it refuses meanwhile."""


def _cut_head(client: redis.Redis, key: bytes, head: Head) -> None:
    client.set(head_name(key), head.encode()[:-1])


def _other_head(client: redis.Redis, key: bytes, head: Head) -> None:
    client.setrange(head_name(key), 0, b"OTHR")


def _other_kind(client: redis.Redis, name: bytes) -> None:
    client.delete(name)
    client.rpush(name, b"no string")


DAMAGES: dict[str, Callable[[redis.Redis, bytes, Head], object]] = {
    "its first piece is lost": lambda c, key, head: c.delete(head.names(key)[0]),
    "all of its pieces are lost": lambda c, key, head: c.delete(*head.names(key)),
    "a piece is longer": lambda c, key, head: c.append(head.names(key)[1], b"more"),
    "a piece is much shorter": lambda c, key, head: c.set(head.names(key)[1], b"short"),
    "a piece is empty": lambda c, key, head: c.set(head.names(key)[-1], b""),
    "a piece is a list": lambda c, key, head: _other_kind(c, head.names(key)[1]),
    "its head is cut": _cut_head,
    "its head is something else": _other_head,
    "its head names no pieces": lambda c, key, head: c.set(
        head_name(key), replace(head, pieces=0).encode()
    ),
    "its head names too many pieces": lambda c, key, head: c.set(
        head_name(key), replace(head, pieces=MAX_PIECES + 1).encode()
    ),
}
"""What may happen to a head or a piece behind the connector's back."""


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
        return f"redis://{host}:{port}/{DATABASE}"

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
            client.delete(b"lmc:{6c697374}")
            client.rpush(b"lmc:{6c697374}", b"no string")

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

    def lose(self, key: bytes) -> None:
        with self._client() as client:
            client.delete(self._head(client, key).names(key)[-1])

    def damages(self) -> Mapping[str, Callable[[bytes], None]]:
        return {name: partial(self._damage, damage) for name, damage in DAMAGES.items()}

    def refusals(self) -> Mapping[str, AbstractContextManager[Collection[str]]]:
        found: dict[str, AbstractContextManager[Collection[str]]] = {
            name: self._changed(*change) for name, change in REFUSALS.items()
        }
        return {**found, "a script keeps it busy": self._busy()}

    def stored(self) -> int:
        """Pieces that no head names have a time to live; what has none stays."""
        with self._client() as client:
            return int(str(client.eval(_COUNT, 0)))

    def raw_get(self, key: bytes) -> bytes | None:
        with self._client() as client:
            if not client.exists(head_name(key)):
                return None
            names = self._head(client, key).names(key)
            if any(client.ttl(name) != -1 for name in names):
                return None  # it will be gone soon
            return b"".join(self._value(client, name) for name in names)

    def server_version(self) -> str:
        with self._client() as client:
            return f"redis {client.info('server')['redis_version']}"

    def _damage(self, damage: Callable[[redis.Redis, bytes, Head], object], key: bytes) -> None:
        with self._client() as client:
            damage(client, key, self._head(client, key))

    @contextmanager
    def _changed(
        self, before: Sequence[str], after: Sequence[str], ops: Sequence[str]
    ) -> Iterator[Sequence[str]]:
        with self._client() as client:
            for order in before:
                client.execute_command(*shlex.split(order))
            try:
                yield ops
            finally:
                for order in after:
                    client.execute_command(*shlex.split(order))

    @contextmanager
    def _busy(self) -> Iterator[Sequence[str]]:
        with self._client() as client, self._client() as other:
            client.config_set("busy-reply-threshold", 1)
            other.connection_pool.get_connection().send_command("EVAL", "while true do end", 0)
            try:
                while self._answers(client):
                    time.sleep(0.01)
                yield ("open", *_READS, *_WRITES)
            finally:
                client.script_kill()

    def _answers(self, client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.exceptions.RedisError:
            return False

    def _client(self) -> redis.Redis:
        return redis.Redis(port=self.server.port, db=DATABASE)

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
        return f"{self.server.unix_url}?db={DATABASE}"

    def stall(self) -> AbstractContextManager[None]:
        return _frozen([self.server])


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
