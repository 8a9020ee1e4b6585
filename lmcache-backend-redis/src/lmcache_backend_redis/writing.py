"""Putting and deleting: pieces under a grace, then one transaction on a watched head."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.wire import CRLF, Part, Reply, ServerError, Session, command
from lmcache_core.sdk import BackendUnavailable

COMMIT_TRIES = 16
FULL = {"OOM", "MISCONF", "NOREPLICAS"}
AWAY = {"LOADING", "NOAUTH", "WRONGPASS", "NOPERM", "CLUSTERDOWN", "MASTERDOWN", "READONLY"}
"""READONLY: a master that has become a replica; a new connection finds the new one."""
ELSEWHERE = {"MOVED", "ASK", "TRYAGAIN"}
"""A cluster's node says that the key's slot is, or will be, at another node."""
_BUSY = "BUSY other writers of the same key were always faster"


class Writer:
    """Stateless but for its settings; each method owns ``session`` and leaves no reply unread.

    Args:
        piece_bytes: of a piece at most.
        ttl_ms: time to live of values; 0 keeps them.
        grace_ms: time to live of pieces that no head names.
    """

    def __init__(self, *, piece_bytes: int, ttl_ms: int, grace_ms: int) -> None:
        self._piece_bytes = piece_bytes
        self._ttl_ms = ttl_ms
        self._grace_ms = grace_ms

    def put(
        self, session: Session, key: bytes, source: memoryview, deadline_s: float
    ) -> ServerError | None:
        """Store ``source``; the server's error when it refuses."""
        head = Head.new(len(source), self._piece_bytes)
        names = head.names(key)
        session.send([*self._pieces(names, head, source), _watch(key)], deadline_s)
        error = first_error([session.reply(deadline_s) for _ in names])
        old = _watched(session, deadline_s)
        if error is None:
            error = self._commit(session, key, head, old, deadline_s)
        if error is not None:
            # They would expire by themselves; a full server wants the room now.
            undo = [command(b"UNWATCH"), *(command(b"UNLINK", name) for name in names)]
            session.send(undo, deadline_s)
            for _ in undo:
                session.reply(deadline_s)
        return error

    def delete(self, session: Session, key: bytes, deadline_s: float) -> ServerError | None:
        """Remove head and pieces; absent is fine."""
        for _ in range(COMMIT_TRIES):
            session.send([_watch(key)], deadline_s)
            old = _watched(session, deadline_s)
            if isinstance(old, ServerError):
                return old
            if old is None:
                _unwatch(session, deadline_s)
                return None
            done = _remove(session, key, old, deadline_s)
            if done is not None:
                return first_error(done)
        return ServerError(_BUSY)

    def drop_version(self, session: Session, key: bytes, version: bytes, deadline_s: float) -> None:
        """Remove head and pieces when the head is still ``version``'s."""
        session.send([_watch(key)], deadline_s)
        old = _watched(session, deadline_s)
        head = Head.decode(old) if isinstance(old, bytes) else None
        if head is not None and head.version == version:
            _remove(session, key, old, deadline_s)
        else:
            _unwatch(session, deadline_s)

    def _pieces(self, names: Sequence[bytes], head: Head, source: memoryview) -> list[Part]:
        """One SET with a grace for each piece; the payload is not copied."""
        grace = b"%d" % self._grace_ms
        closing = CRLF + b"$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(grace), grace)
        parts: list[Part] = []
        for name, (start, end) in zip(names, head.spans()):
            opening = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, end - start)
            parts += [opening, source[start:end], closing]
        return parts

    def _commit(
        self, session: Session, key: bytes, head: Head, old: Reply, deadline_s: float
    ) -> ServerError | None:
        """Publish ``head`` over the watched ``old``."""
        names = head.names(key)
        for _ in range(COMMIT_TRIES):
            if isinstance(old, ServerError):
                return old
            done = _execute(session, self._orders(key, head, old), deadline_s)
            if done is not None:
                error = first_error(done)
                if error is None and any(reply != 1 for reply in done[1 : 1 + len(names)]):
                    error = ServerError("GONE a piece was evicted before its head was set")
                if error is not None:
                    self.drop_version(session, key, head.version, deadline_s)
                return error
            session.send([_watch(key)], deadline_s)
            old = _watched(session, deadline_s)
        return ServerError(_BUSY)

    def _orders(self, key: bytes, head: Head, old: Reply) -> list[bytes]:
        ttl = [b"PX", b"%d" % self._ttl_ms] if self._ttl_ms else []
        orders = [command(b"MULTI"), command(b"SET", head_name(key), head.encode(), *ttl)]
        for name in head.names(key):
            # With a time to live the head goes first, the pieces after their last reader.
            orders.append(
                command(b"PEXPIRE", name, self._ttl_ms + self._grace_ms)
                if self._ttl_ms
                else command(b"PERSIST", name)
            )
        previous = Head.decode(old) if isinstance(old, bytes) else None
        for name in previous.names(key) if previous else ():
            orders.append(command(b"PEXPIRE", name, self._grace_ms))
        return [*orders, command(b"EXEC")]


def _watch(key: bytes) -> bytes:
    name = head_name(key)
    return command(b"WATCH", name) + command(b"GET", name)


def _watched(session: Session, deadline_s: float) -> Reply:
    """The head after `_watch`: bytes, None when absent, or an error."""
    watch, old = session.reply(deadline_s), session.reply(deadline_s)
    return watch if isinstance(watch, ServerError) else old


def _unwatch(session: Session, deadline_s: float) -> None:
    session.send([command(b"UNWATCH")], deadline_s)
    session.reply(deadline_s)


def _remove(session: Session, key: bytes, old: Reply, deadline_s: float) -> list[Reply] | None:
    """Delete the watched ``old`` and its pieces; None when it changed meanwhile."""
    head = Head.decode(old) if isinstance(old, bytes) else None
    names = head.names(key) if head else []
    orders = [command(b"MULTI"), command(b"UNLINK", head_name(key), *names), command(b"EXEC")]
    return _execute(session, orders, deadline_s)


def _execute(session: Session, orders: Sequence[bytes], deadline_s: float) -> list[Reply] | None:
    """What a transaction gave; its error alone when it was refused, None when the watched head
    changed."""
    session.send(orders, deadline_s)
    *queued, done = [session.reply(deadline_s) for _ in orders]
    if done is None or isinstance(done, list):
        return done
    return [first_error([*queued, done]) or ServerError("ERR a strange answer to EXEC")]


def first_error(replies: Sequence[Reply]) -> ServerError | None:
    """The first error among ``replies``."""
    return next((reply for reply in replies if isinstance(reply, ServerError)), None)


_HINTS = {
    "NOAUTH": "give user and password in the URL: redis://user:password@host",
    "WRONGPASS": "check user and password of the URL",
    "NOPERM": "give the ACL user the rights that the README lists",
    "MOVED": "the server is a node of a cluster: write redis+cluster://",
}


def as_exception(error: ServerError) -> Exception:
    """What the contract calls ``error``: no room, not available now, or an I/O error."""
    if error.code in FULL:
        return OSError(errno.ENOSPC, str(error))
    if error.code in AWAY:
        hint = _HINTS.get(error.code, "look at the server's log")
        return BackendUnavailable(str(error), backend="redis", hint=hint)
    return OSError(errno.EIO, str(error))
