"""State in Redis or Valkey, for several controllers.

Of each kind: a string a document (``VERSION:VALUE``), a sorted set of ids by version, and one of
ids by end.  Scripts make each change one step.  No cluster: scripts touch keys of several slots.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lmcache_core.controller.state import GONE_KEPT_S, Changes, Document
from lmcache_core.sdk import BackendUnavailable, ConfigError
from lmcache_core.url import redact

PREFIX = "lmcache:controller:"
TIMEOUT_S = 2.0
_NEVER = ""

_COMMON = """
local prefix = ARGV[1]
local function name(kind, part) return prefix .. kind .. part end
local function clock() local t = redis.call('TIME'); return t[1] + t[2] / 1000000 end
local function purge(kind)
  local ids = redis.call('ZRANGEBYSCORE', name(kind, '#ends'), '-inf', clock(), 'LIMIT', 0, 64)
  for _, id in ipairs(ids) do
    redis.call('ZREM', name(kind, '#ends'), id)
    redis.call('ZREM', name(kind, '#versions'), id)
  end
end
local function mark(kind, id, ttl_ms)
  local version = redis.call('INCR', prefix .. '#version')
  redis.call('ZADD', name(kind, '#versions'), version, id)
  if ttl_ms == '' then
    redis.call('ZREM', name(kind, '#ends'), id)
  else
    redis.call('ZADD', name(kind, '#ends'), clock() + ttl_ms / 1000, id)
  end
  return version
end
"""
_PUT = (
    _COMMON
    + """
local kind, id, value, expect, ttl_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local key = name(kind, ':' .. id)
if expect ~= '' then
  local found = redis.call('GET', key)
  local version = '0'
  if found then version = string.match(found, '^%d+') end
  if version ~= expect then return false end
end
purge(kind)
local version = mark(kind, id, ttl_ms)
local stored = string.format('%.0f:', version) .. value
if ttl_ms == '' then
  redis.call('SET', key, stored)
else
  redis.call('SET', key, stored, 'PX', ttl_ms)
end
return version
"""
)
_DELETE = (
    _COMMON
    + """
local kind, id, gone_ms = ARGV[2], ARGV[3], ARGV[4]
if redis.call('DEL', name(kind, ':' .. id)) == 1 then mark(kind, id, gone_ms) end
return 1
"""
)
_CHANGES = (
    _COMMON
    + """
local after, limit = ARGV[2], ARGV[3]
local epoch = prefix .. '#epoch'
redis.call('SET', epoch, ARGV[4], 'NX')
local found = {}
for i = 5, #ARGV do
  local kind = ARGV[i]
  local rows = redis.call('ZRANGEBYSCORE', name(kind, '#versions'), '(' .. after, '+inf',
    'WITHSCORES', 'LIMIT', 0, limit)
  for j = 1, #rows, 2 do
    table.insert(found, {kind, rows[j], tonumber(rows[j + 1])})
  end
end
table.sort(found, function(a, b) return a[3] < b[3] end)
local answer = {redis.call('GET', epoch)}
for i = 1, math.min(#found, tonumber(limit)) do
  local kind, id, version = found[i][1], found[i][2], found[i][3]
  local ends = redis.call('ZSCORE', name(kind, '#ends'), id)
  local value = redis.call('GET', name(kind, ':' .. id))
  table.insert(answer, {kind, id, string.format('%.0f', version), ends or '', value})
end
return answer
"""
)
_COUNT = (
    _COMMON
    + """
purge(ARGV[2])
return redis.call('ZCARD', name(ARGV[2], '#versions'))
"""
)


class RedisState:
    """See `State`.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, with user, password and number of the
            database.
        timeout_s: for each step of a call; a call takes at most three.

    Raises:
        ConfigError: no such URL, or the server refuses the user.
    """

    shared = True

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.address = redact(url)
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 1),
                max_connections=32,
                decode_responses=False,
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.address} is no address of Redis",
                op="controller",
                hint="write redis://HOST:PORT/DB",
            ) from error
        script = self._client.register_script
        self._put, self._delete = script(_PUT), script(_DELETE)
        self._changes, self._count = script(_CHANGES), script(_COUNT)

    def get(self, kind: str, id: str) -> Document | None:
        """See `State`."""
        with self._told():
            found: Any = self._client.get(f"{PREFIX}{kind}:{id}")
            if found is None:
                return None
            version, _, value = found.partition(b":")
            # When it ends is not asked for: who reads one document has no use for it.
            return Document(kind, id, value, int(version), None)

    def put(
        self, kind: str, id: str, value: bytes, *, expect: int | None, ttl_s: float | None = None
    ) -> int | None:
        """See `State`."""
        expected = _NEVER if expect is None else str(expect)
        with self._told():
            found = self._put(args=[PREFIX, kind, id, value, expected, _ms(ttl_s)])
            return None if found is None else int(found)

    def put_all(self, kind: str, values: dict[str, bytes]) -> list[int]:
        """See `State`."""
        with self._told(), self._client.pipeline(transaction=False) as pipe:
            for id, value in values.items():
                self._put(args=[PREFIX, kind, id, value, _NEVER, _NEVER], client=pipe)
            return [int(version) for version in pipe.execute()]

    def delete(self, kind: str, id: str) -> None:
        """See `State`."""
        with self._told():
            self._delete(args=[PREFIX, kind, id, _ms(GONE_KEPT_S)])

    def changes(self, kinds: Sequence[str], *, after: int, limit: int) -> Changes:
        """See `State`."""
        with self._told():
            answer = self._changes(args=[PREFIX, after, limit, secrets.token_hex(8), *kinds])
        documents = []
        for kind, id, version, ends, value in answer[1:]:
            body = None if value is None else value.partition(b":")[2]
            expires_s = float(ends) if ends else None
            documents.append(Document(kind.decode(), id.decode(), body, int(version), expires_s))
        return Changes(answer[0].decode(), documents)

    def count(self, kind: str) -> int:
        """See `State`."""
        with self._told():
            return int(self._count(args=[PREFIX, kind]))

    def close(self) -> None:
        """See `State`."""
        self._client.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            raise ConfigError(
                f"Redis at {self.address} refuses us: {error}",
                op="controller",
                hint="it needs a user that may run scripts on lmcache:controller:*",
            ) from error
        except (redis.RedisError, OSError) as error:
            raise BackendUnavailable(
                f"Redis at {self.address} failed: {type(error).__name__}",
                op="state",
                hint="is it up?  What needs it works again when it is",
            ) from error


def _ms(ttl_s: float | None) -> str:
    return _NEVER if ttl_s is None else str(max(1, int(ttl_s * 1000)))
