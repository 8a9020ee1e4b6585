"""Reading a batch over one connection: all heads in one round trip, then piece after piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.sessions import Sessions
from lmcache_backend_redis.wire import ServerError, Session, WrongSize, command
from lmcache_backend_redis.writing import AWAY, ELSEWHERE, as_exception
from lmcache_core.sdk import GetResult, Status

HEAD_READS = 3


class Read:
    """One key of a batch.

    Attributes:
        key, target: what to read, and where to; a target of None is REJECTED.
        result: once it is decided.
        elsewhere: what a cluster's node said that no longer has the key, or does not yet.
        version: of the head read last.
        reading: its pieces are on the wire now.
        torn: its head names pieces that are gone.
    """

    __slots__ = ("elsewhere", "key", "reading", "result", "target", "torn", "version")

    def __init__(self, key: bytes, target: memoryview | None) -> None:
        self.key = key
        self.target = target
        self.version = b""
        self.reading = False
        self.torn = False
        self.elsewhere: ServerError | None = None
        self.result = None if target is not None else GetResult(Status.REJECTED)

    result: GetResult | None

    @property
    def open(self) -> bool:
        """Whether this server has still to decide it."""
        return self.result is None and self.elsewhere is None

    @property
    def failed(self) -> bool:
        """Whether it is FAILED."""
        return self.result is not None and self.result.status is Status.FAILED

    def settle(self, status: Status, nbytes: int = 0) -> None:
        """Decide it."""
        self.result = GetResult(status, nbytes)
        self.reading = False


def read_all(sessions: Sessions, reads: Sequence[Read], deadline_s: float) -> None:
    """Decide every read, on as many connections as that takes; those past the deadline stay
    undecided.

    Raises:
        BackendUnavailable: the server is away, or refuses everything.
    """
    while any(read.open for read in reads):
        try:
            sessions.run(lambda session: read_values(session, reads, deadline_s), deadline_s)
        except (WrongSize, ServerError) as error:
            if isinstance(error, ServerError) and error.code in AWAY:
                raise as_exception(error) from error
            # The stream is out of step, so the others need another connection.
            read = next(read for read in reads if read.reading)
            if isinstance(error, ServerError) and error.code in ELSEWHERE:
                read.elsewhere, read.reading = error, False
            else:
                read.settle(Status.CORRUPT if isinstance(error, WrongSize) else Status.FAILED)
        except TimeoutError:
            return


def read_values(session: Session, reads: Sequence[Read], deadline_s: float) -> None:
    """Decide every read of ``reads`` that is not decided yet and is here; may be repeated.

    A reader that misses a piece, since the value was replaced or evicted meanwhile, reads the
    head again, at most `HEAD_READS` times in all; the same version again means MISS.

    Raises:
        WrongSize: the read that is `Read.reading` has a piece of a wrong length.
        ServerError: the server refuses that read, or all of them.
        TimeoutError: undecided reads stay undecided.
    """
    left = [read for read in reads if read.open]
    for read in left:
        # An earlier try may have ended halfway, with its connection.
        read.version, read.reading = b"", False
    for _ in range(HEAD_READS):
        found = _read_heads(session, left, deadline_s)
        left = _read_pieces(session, found, deadline_s)
        if not left:
            return
    for read in left:
        read.torn = True
        read.settle(Status.MISS)


def _read_heads(
    session: Session, reads: Sequence[Read], deadline_s: float
) -> list[tuple[Read, Head]]:
    """Those whose pieces are to be read; the others are decided."""
    session.send([b"".join(command(b"GET", head_name(read.key)) for read in reads)], deadline_s)
    found: list[tuple[Read, Head]] = []
    for read in reads:
        data = session.reply(deadline_s)
        head = Head.decode(data) if isinstance(data, bytes) else None
        assert read.target is not None
        if data is None:
            read.settle(Status.MISS)
        elif isinstance(data, ServerError):
            if data.code in AWAY:
                raise data
            if data.code in ELSEWHERE:
                read.elsewhere = data
            else:
                read.settle(Status.FAILED)
        elif head is None:
            read.settle(Status.CORRUPT)
        elif head.nbytes > len(read.target):
            read.settle(Status.SIZE_MISMATCH, head.nbytes)
        elif head.version == read.version:
            read.torn = True
            read.settle(Status.MISS)
        else:
            read.version = head.version
            found.append((read, head))
    return found


def _read_pieces(
    session: Session, found: Sequence[tuple[Read, Head]], deadline_s: float
) -> list[Read]:
    """Fill targets; returns the reads of which a piece is gone.

    The next piece is asked for before the last one is read, so the server need not wait.
    """
    requests = iter(
        [command(b"GET", name) for read, head in found for name in head.names(read.key)]
    )
    _send_next(session, requests, deadline_s)
    missing: list[Read] = []
    for read, head in found:
        assert read.target is not None
        read.reading = True
        whole = True
        for start, end in head.spans():
            _send_next(session, requests, deadline_s)
            whole &= session.value_into(read.target[start:end], deadline_s)
        read.reading = False
        if whole:
            read.settle(Status.OK, head.nbytes)
        else:
            missing.append(read)
    return missing


def _send_next(session: Session, requests: Iterator[bytes], deadline_s: float) -> None:
    request = next(requests, None)
    if request is not None:
        session.send([request], deadline_s)
