"""`RedisConnector`: values in Redis or Valkey, split into pieces, published by one MULTI.

A put writes its pieces under a new random version with a time to live, then one transaction
sets the head, makes the pieces stay and lets the pieces before expire.  So a reader sees one
put's whole bytes, and a writer that dies leaves nothing behind but pieces that expire.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from lmcache_backend_redis.layout import MAX_PIECES, head_name
from lmcache_backend_redis.reading import Read, read_all
from lmcache_backend_redis.scanning import ask, scan_server
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Reply, ServerError, Session, command
from lmcache_backend_redis.writing import AWAY, Writer, as_exception
from lmcache_core.sdk import (
    BackendUnavailable,
    BatchLoop,
    Buffer,
    Capabilities,
    ConfigError,
    Durability,
    GetResult,
    Health,
    OpContext,
    ScanEntry,
    Sharing,
    Status,
)


class RedisConnector(BatchLoop):
    """Thread-safe up to ``connections`` calls.

    Args:
        sessions: the connections; closed with the connector.
        facts: of `server_facts`.
        connections: equal to the limit of ``sessions``.
        piece_bytes: size of a piece at most.
        ttl_s: time to live of values; 0 keeps them.
        longest_deadline_s: longest deadline of any client.  Pieces that no head names, being
            written or replaced, live twice as long.
        sharing: who else reads this server.
    """

    def __init__(
        self,
        sessions: Sessions,
        facts: dict[str, str],
        *,
        connections: int = 4,
        piece_bytes: int = 2 << 20,
        ttl_s: float = 0.0,
        longest_deadline_s: float = 10.0,
        sharing: Sharing = Sharing.CLUSTER,
    ) -> None:
        super().__init__("redis")
        self._sessions = sessions
        self._writer = Writer(
            piece_bytes=piece_bytes,
            ttl_ms=int(ttl_s * 1000),
            grace_ms=int(longest_deadline_s * 2000),
        )
        self.capabilities = capabilities(
            facts, connections=connections, piece_bytes=piece_bytes, ttl_s=ttl_s, sharing=sharing
        )

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")
        request = b"".join(command(b"EXISTS", head_name(key)) for key in keys)
        replies = ask(self._sessions, request, len(keys), ctx.deadline_s)
        if replies is None:
            return [Status.TIMED_OUT] * len(keys)
        return [_present(reply) for reply in replies]

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        """See `exists`, which asks for a whole batch in one round trip."""
        raise NotImplementedError("exists answers the whole batch")

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        reads = [Read(key, self.usable_view(target)) for key, target in zip(keys, targets)]
        read_all(self._sessions, reads, ctx.deadline_s)
        for read in reads:
            if read.torn:
                self._drop_torn(read, ctx.deadline_s)
        return [read.result or GetResult(Status.TIMED_OUT) for read in reads]

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        """See `get_into`, which reads a whole batch over one connection."""
        raise NotImplementedError("get_into answers the whole batch")

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self._change(lambda s: self._writer.put(s, key, source, deadline_s), deadline_s)

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        self._change(lambda s: self._writer.delete(s, key, deadline_s), deadline_s)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every whole value whose key starts with ``prefix``."""
        self.check_call((), "scan")
        return scan_server(self._sessions, prefix, ctx.deadline_s)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        request = command(b"PING") + command(b"INFO", b"memory")
        replies = ask(self._sessions, request, 2, ctx.deadline_s)
        if replies is None:
            return Health(ok=False, reason="no answer before the deadline")
        ping, info = replies
        if isinstance(ping, ServerError):
            return Health(ok=False, reason=str(ping))
        facts = parse_info(info)
        return Health(
            ok=True,
            used_bytes=int(facts.get("used_memory", -1)),
            total_bytes=int(facts.get("maxmemory", 0)) or -1,
        )

    def close_resources(self) -> None:
        self._sessions.close()

    def _change(self, op: Callable[[Session], ServerError | None], deadline_s: float) -> None:
        error = self._sessions.run(op, deadline_s)
        if error is not None:
            if error.code in AWAY:
                self._sessions.drop_idle()
            raise as_exception(error)

    def _drop_torn(self, read: Read, deadline_s: float) -> None:
        """A head whose pieces are gone goes too; if that fails, the next reader tries."""
        with contextlib.suppress(OSError, BackendUnavailable):
            self._sessions.run(
                lambda s: self._writer.drop_version(s, read.key, read.version, deadline_s),
                deadline_s,
            )


def capabilities(
    facts: dict[str, str],
    *,
    connections: int = 4,
    piece_bytes: int = 2 << 20,
    ttl_s: float = 0.0,
    sharing: Sharing = Sharing.CLUSTER,
) -> Capabilities:
    """What a connector to a server with these ``facts`` claims."""
    bounded = facts.get("maxmemory", "0") != "0"
    evicts = bounded and facts.get("maxmemory_policy") != "noeviction"
    # With an append-only file Redis writes before it answers: a killed server loses nothing.  But
    # `everysec` holds a write back for up to 2 s while a sync runs.
    kept = facts.get("aof_enabled") == "1" and facts.get("appendfsync") in ("always", "no")
    return Capabilities(
        max_concurrency=connections,
        max_batch=128,
        max_value_bytes=MAX_PIECES * piece_bytes,
        scan=True,
        evicts=evicts or ttl_s > 0 or not facts,
        capacity_reported=bounded,
        durability=Durability.SERVER if kept else Durability.PROCESS,
        sharing=sharing,
    )


def server_facts(sessions: Sessions, deadline_s: float) -> dict[str, str]:
    """Fields of INFO memory, persistence and cluster, and ``appendfsync``; without those that the
    ACL forbids.

    Raises:
        ConfigError, BackendUnavailable, TimeoutError: see `Sessions.connect`.
    """

    def op(session: Session) -> list[Reply]:
        sections = (b"memory", b"persistence", b"cluster")
        requests = [command(b"INFO", section) for section in sections]
        session.send([*requests, command(b"CONFIG", b"GET", b"appendfsync")], deadline_s)
        return [session.reply(deadline_s) for _ in range(len(sections) + 1)]

    found: dict[str, str] = {}
    *replies, config = sessions.run(op, deadline_s)
    if isinstance(config, list) and len(config) == 2 and isinstance(config[1], bytes):
        found["appendfsync"] = config[1].decode(errors="replace")
    for reply in replies:
        if isinstance(reply, ServerError) and reply.code == "NOAUTH":
            raise ConfigError(
                str(reply), backend="redis", op="open", hint="give user and password in the URL"
            )
        if isinstance(reply, ServerError) and reply.code != "NOPERM":
            raise as_exception(reply)
        found |= parse_info(reply)
    return found


def parse_info(reply: Reply) -> dict[str, str]:
    """Fields of an INFO reply."""
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def _present(reply: Reply) -> Status:
    if isinstance(reply, ServerError):
        if reply.code in AWAY:
            raise as_exception(reply)
        return Status.FAILED
    return Status.OK if reply == 1 else Status.MISS
