"""Listing what one server holds, page by page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from lmcache_backend_redis.layout import Head, head_name, head_pattern, key_of
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import Reply, ServerError, Session, command
from lmcache_backend_redis.writing import as_exception
from lmcache_core.sdk import ScanEntry

_PAGE = 500
_BATCH = 128


def ask(sessions: Sessions, request: bytes, count: int, deadline_s: float) -> list[Reply] | None:
    """``count`` replies to commands without effect, or None past the deadline."""

    def op(session: Session) -> list[Reply]:
        session.send([request], deadline_s)
        return [session.reply(deadline_s) for _ in range(count)]

    try:
        return sessions.run(op, deadline_s)
    except TimeoutError:
        return None


def scan_server(sessions: Sessions, prefix: bytes, deadline_s: float) -> Iterator[ScanEntry]:
    """Every whole value of one server whose key starts with ``prefix``.

    Raises:
        TimeoutError: the deadline has passed.
        BackendUnavailable: the server is away.
    """
    cursor = b"0"
    while True:
        count = b"%d" % _PAGE
        request = command(b"SCAN", cursor, b"MATCH", head_pattern(prefix), b"COUNT", count)
        cursor, names = _page(ask(sessions, request, 1, deadline_s))
        keys = [key for name in names if (key := key_of(name)) is not None]
        for start in range(0, len(keys), _BATCH):
            yield from _entries(sessions, keys[start : start + _BATCH], deadline_s)
        if cursor == b"0":
            return


def _entries(sessions: Sessions, keys: list[bytes], deadline_s: float) -> Iterator[ScanEntry]:
    request = b"".join(
        # Idle time first: a GET would reset it.
        command(b"OBJECT", b"IDLETIME", head_name(key)) + command(b"GET", head_name(key))
        for key in keys
    )
    replies = ask(sessions, request, 2 * len(keys), deadline_s)
    if replies is None:
        raise TimeoutError("the scan took longer than its deadline")
    now_s = time.time()
    for key, idle, data in zip(keys, replies[::2], replies[1::2]):
        head = Head.decode(data) if isinstance(data, bytes) else None
        if head is not None:
            yield ScanEntry(key, head.nbytes, now_s - idle if isinstance(idle, int) else 0.0)


def _page(replies: list[Reply] | None) -> tuple[bytes, list[bytes]]:
    if replies is None:
        raise TimeoutError("the scan took longer than its deadline")
    reply = replies[0]
    if isinstance(reply, ServerError):
        raise as_exception(reply)
    with contextlib.suppress(TypeError, ValueError):
        cursor, names = reply  # type: ignore[misc]
        return bytes(cursor), [bytes(name) for name in names]  # type: ignore[arg-type, union-attr]
    raise ConnectionError("SCAN gave something else than a page")
