"""``redis+cluster://``: a batch is split by slot, each node answers its part, all at once.

A key that has moved (MOVED) is asked for again at its new node, in the same call.  While its slot
is on the way (ASK) it is read at the node where it will be; a put or delete of it waits a little,
and else is FAILED: the store can't change head and pieces together then.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lmcache_backend_redis.connector import parse_info
from lmcache_backend_redis.errands import Errand, R, fail
from lmcache_backend_redis.layout import MAX_PIECES, head_name
from lmcache_backend_redis.nodes import Address, Nodes
from lmcache_backend_redis.reading import Read, read_all, read_values
from lmcache_backend_redis.scanning import ask, scan_server
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Part, Reply, ServerError, Session, command
from lmcache_backend_redis.writing import AWAY, ELSEWHERE, Writer, as_exception
from lmcache_core.sdk import (
    BackendUnavailable,
    BaseConnector,
    Buffer,
    Capabilities,
    Counter,
    Durability,
    GetResult,
    Health,
    OpContext,
    ScanEntry,
    Sharing,
    Status,
    Workers,
)

REDIRECTS = 8
"""How often one key of one call follows the cluster before it is FAILED."""
_MOVING_PAUSE_S = 0.02
SILENT_S = 0.1
"""A node that says nothing for so long, until the deadline, is left alone."""


class ClusterConnector(BaseConnector):
    """Thread-safe up to ``connections`` calls.

    Args:
        nodes: refreshed once; closed with the connector.
        counter: of `HostServices`.
        connections: of a node's `Sessions`.
        piece_bytes, ttl_s, longest_deadline_s: see `RedisConnector`.
    """

    def __init__(
        self,
        nodes: Nodes,
        *,
        counter: Callable[[str], Counter],
        connections: int,
        piece_bytes: int,
        ttl_s: float,
        longest_deadline_s: float,
    ) -> None:
        super().__init__("redis")
        self._nodes = nodes
        self._redirected = counter("redis.redirected")
        self._rested = counter("redis.node_rested")
        self._workers = Workers("redis-cluster", max_stuck=1)
        self._writer = Writer(
            piece_bytes=piece_bytes,
            ttl_ms=int(ttl_s * 1000),
            grace_ms=int(longest_deadline_s * 2000),
        )
        self.capabilities = Capabilities(
            max_concurrency=connections,
            max_batch=128,
            max_value_bytes=MAX_PIECES * piece_bytes,
            scan=True,
            # Replication is asynchronous: a failover may lose what was acknowledged last.
            evicts=True,
            durability=Durability.PROCESS,
            sharing=Sharing.CLUSTER,
        )

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")

        def op(sessions: Sessions, part: Sequence[Errand], asking: bool) -> None:
            names = [command(b"EXISTS", head_name(errand.key)) for errand in part]
            first = [command(b"ASKING")] if asking else []
            replies = ask(
                sessions, b"".join([*first, *names]), len(names) + len(first), ctx.deadline_s
            )
            for errand, reply in zip(part, (replies or [])[len(first) :]):
                error = reply if isinstance(reply, ServerError) else None
                errand.take(error, Status.OK if reply == 1 else Status.MISS)

        return self._statuses([Errand(key) for key in keys], op, ctx)

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        reads = [Read(key, self.usable_view(target)) for key, target in zip(keys, targets)]

        def op(sessions: Sessions, part: Sequence[Read], asking: bool) -> None:
            if asking:
                _read_asking(sessions, part[0], ctx.deadline_s)
            else:
                read_all(sessions, part, ctx.deadline_s)

        self._route(reads, op, ctx.deadline_s)
        for read in reads:
            if read.torn:
                self._drop_torn(read, ctx.deadline_s)
        return [read.result or GetResult(Status.TIMED_OUT) for read in reads]

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        errands = [Errand(key, self.usable_view(source)) for key, source in zip(keys, sources)]
        for errand, source in zip(errands, sources):
            if errand.source is None or source.nbytes > self.capabilities.max_value_bytes:
                errand.settle(Status.REJECTED)

        def change(errand: Errand, session: Session) -> ServerError | None:
            assert errand.source is not None
            return self._writer.put(session, errand.key, errand.source, ctx.deadline_s)

        return self._changed(errands, change, ctx)

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")

        def change(errand: Errand, session: Session) -> ServerError | None:
            return self._writer.delete(session, errand.key, ctx.deadline_s)

        return self._changed([Errand(key) for key in keys], change, ctx)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every whole value of every node whose key starts with ``prefix``."""
        self.check_call((), "scan")
        for address in self._nodes.masters():
            yield from scan_server(self._nodes.sessions(address), prefix, ctx.deadline_s)

    def health(self, ctx: OpContext) -> Health:
        """Well when a node answers; those that rest are in the details."""
        self.check_call((), "health")
        if ctx.remaining_s() <= 0:
            return Health(ok=False, reason="no answer before the deadline")
        masters = self._nodes.masters()
        said: dict[str, str] = {}
        used_bytes = 0
        for address in masters:
            if self._nodes.rests(address):
                said[f"{address[0]}:{address[1]}"] = "does not answer"
                continue
            request = command(b"PING") + command(b"INFO", b"memory")
            try:
                replies = ask(self._nodes.sessions(address), request, 2, ctx.deadline_s)
            except BackendUnavailable as error:
                replies, said[f"{address[0]}:{address[1]}"] = None, error.message
            if replies is None or isinstance(replies[0], ServerError):
                self._nodes.rest(address)
                said.setdefault(f"{address[0]}:{address[1]}", "does not answer")
            else:
                used_bytes += int(parse_info(replies[1]).get("used_memory", 0))
        ok = len(said) < len(masters)
        reason = "" if ok else "; ".join(f"{name}: {why}" for name, why in said.items())
        return Health(ok=ok, reason=reason, used_bytes=used_bytes, details=said)

    def close_resources(self) -> None:
        self._nodes.close()
        self._workers.close()

    def _drop_torn(self, read: Read, deadline_s: float) -> None:
        """A head whose pieces are gone goes too; if that fails, the next reader tries."""
        address = self._nodes.owner(read.key)
        if address is None:
            return
        with contextlib.suppress(OSError, BackendUnavailable):
            self._nodes.sessions(address).run(
                lambda s: self._writer.drop_version(s, read.key, read.version, deadline_s),
                deadline_s,
            )

    def _changed(
        self,
        errands: list[Errand],
        change: Callable[[Errand, Session], ServerError | None],
        ctx: OpContext,
    ) -> list[Status]:
        def op(sessions: Sessions, part: Sequence[Errand], asking: bool) -> None:
            for errand in part:
                error = sessions.run(partial(change, errand), ctx.deadline_s)
                if error is not None and error.code in AWAY:
                    sessions.drop_idle()
                errand.take(error, Status.OK)

        return self._statuses(errands, op, ctx, asks=False)

    def _statuses(
        self,
        errands: list[Errand],
        op: Callable[[Sessions, Sequence[Errand], bool], None],
        ctx: OpContext,
        *,
        asks: bool = True,
    ) -> list[Status]:
        self._route(errands, op, ctx.deadline_s, asks=asks)
        return [errand.status or Status.TIMED_OUT for errand in errands]

    def _route(
        self,
        errands: Sequence[R],
        op: Callable[[Sessions, Sequence[R], bool], None],
        deadline_s: float,
        *,
        asks: bool = True,
    ) -> None:
        """Have every errand decided by its node; those past the deadline stay open.

        Raises:
            BackendUnavailable: no node that has any of them answers.
        """
        away: list[BackendUnavailable] = []
        turn = 0
        while time.monotonic() < deadline_s:
            left = [errand for errand in errands if errand.open or errand.elsewhere]
            parts = self._split(left, away, asks=asks)
            if not parts:
                break
            if turn > REDIRECTS:
                fail(errand for _, _, part in parts for errand in part)
                break
            turn += 1
            self._at_once([partial(self._visit, *part, op, away, deadline_s) for part in parts])
        if away and all(errand.failed for errand in errands):
            raise away[0]

    def _split(
        self, errands: Sequence[R], away: list[BackendUnavailable], *, asks: bool
    ) -> list[tuple[Address, bool, list[R]]]:
        """Errands by the node to visit, and whether it is to be told that we were sent (ASKING);
        those go alone."""
        here: dict[Address, list[R]] = {}
        sent: list[tuple[Address, bool, list[R]]] = []
        pause = False
        for errand in errands:
            said, errand.elsewhere = errand.elsewhere, None
            target = self._nodes.owner(errand.key)
            if said is not None:
                self._redirected.inc()
                redirect = _redirect(said)
                if redirect is None or (said.code == "ASK" and not asks):
                    pause = True
                elif said.code == "ASK":
                    sent.append((redirect[1], True, [errand]))
                    continue
                else:
                    self._nodes.moved(*redirect)
                    target = redirect[1]
            if target is None or self._nodes.rests(target):
                errand.settle(Status.FAILED)
                away.append(_rests(target))
            else:
                here.setdefault(target, []).append(errand)
        if pause:
            time.sleep(_MOVING_PAUSE_S)
        return [*((address, False, part) for address, part in here.items()), *sent]

    def _visit(
        self,
        address: Address,
        asking: bool,
        part: Sequence[R],
        op: Callable[[Sessions, Sequence[R], bool], None],
        away: list[BackendUnavailable],
        deadline_s: float,
    ) -> None:
        """Let one node decide its part."""
        started_s = time.monotonic()
        try:
            op(self._nodes.sessions(address), part, asking)
        except BackendUnavailable as error:
            away.append(error)
            fail(part)
            if not _is_our_own(error):
                self._rested.inc()
                self._nodes.rest(address)
        except TimeoutError:
            pass  # open past the deadline: TIMED_OUT
        now_s = time.monotonic()
        silent = now_s >= deadline_s and now_s - started_s >= SILENT_S
        if silent and any(errand.open for errand in part):
            self._rested.inc()
            self._nodes.rest(address)

    def _at_once(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run jobs beside each other; each ends by the deadline it knows."""
        done = threading.Semaphore(0)
        errors: list[Exception] = []

        def run(job: Callable[[], None]) -> None:
            try:
                job()
            except Exception as error:  # raised again in the caller
                errors.append(error)
            finally:
                done.release()

        for job in jobs[1:]:
            self._workers.start(partial(run, job))
        run(jobs[0])
        for _ in jobs:
            done.acquire()
        if errors:
            raise errors[0]


class _AskingSession(Session):
    """Says ASKING before every command; for code that sends one command at a time."""

    def __init__(self, session: Session) -> None:
        self._inner = session

    def send(self, parts: Sequence[Part], deadline_s: float) -> None:
        self._inner.send([command(b"ASKING"), *parts], deadline_s)

    def reply(self, deadline_s: float) -> Reply:
        self._inner.reply(deadline_s)
        return self._inner.reply(deadline_s)

    def value_into(self, target: memoryview, deadline_s: float) -> bool:
        self._inner.ok(deadline_s)
        return self._inner.value_into(target, deadline_s)


def _read_asking(sessions: Sessions, read: Read, deadline_s: float) -> None:
    """Read one key at the node where its slot will be."""
    had_head = bool(read.version)
    try:
        sessions.run(
            lambda session: read_values(_AskingSession(session), [read], deadline_s), deadline_s
        )
    except ServerError as error:
        if error.code in AWAY:
            raise as_exception(error) from error
        read.reading = False
        read.elsewhere = error if error.code in ELSEWHERE else None
    lost = read.result is not None and read.result.status is Status.MISS
    if read.torn or (lost and had_head):
        # Head and pieces go one by one: a part that is still, or already, there is not lost.
        read.torn, read.result = False, None
        read.elsewhere = ServerError("TRYAGAIN its slot is on the way")


def _is_our_own(error: BaseException | None) -> bool:
    """Whether it was for want of a file descriptor here: that says nothing about the node."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _rests(address: Address | None) -> BackendUnavailable:
    where = "no node has the slot" if address is None else f"{address[0]}:{address[1]} rests"
    return BackendUnavailable(
        where, backend="redis", hint="look at CLUSTER NODES; it is asked again by itself"
    )


def _redirect(error: ServerError) -> tuple[int, Address] | None:
    """Slot and address of ``MOVED slot host:port``; None when it names none."""
    words = str(error).split()
    if len(words) < 3 or not words[1].isdigit():
        return None
    host, _, port = words[2].rpartition(":")
    return (int(words[1]), (host, int(port))) if host and port.isdigit() else None
