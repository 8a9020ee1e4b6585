"""The two ends of a lane of ``tcp://``: who asks, and who owns the memory and answers."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_core.channels.tcp_wire import WRITE, Request, Stopped, Wire, pack, until
from lmcache_core.sdk import Access, Grants, LMCacheError, Part, Status

LANE_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class Transfer:
    """One write or read, from its start to its answers."""

    request: Request
    views: Sequence[memoryview]
    deadline_s: float
    cancelled: bool = False
    sending: bool = False
    left: list[memoryview] | None = None
    asking: Asking | None = None
    answers: list[Status] | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self, status: Status, answers: Sequence[Status] = ()) -> None:
        """Give ``answers``, or ``status`` for every piece.  Once."""
        self.answers = list(answers) or [status] * len(self.views)
        self.ended.set()


class Asking:
    """Our transfers to one peer, one after the other, on a thread of their own.

    Args:
        connect: gives a new lane before a deadline.
        max_transfers: that may wait or run.
    """

    def __init__(
        self, name: str, connect: Callable[[float], socket.socket], max_transfers: int
    ) -> None:
        self._name = name
        self._connect = connect
        self._max_transfers = max_transfers
        self._queue: deque[Transfer] = deque()
        self._running: Transfer | None = None
        self._changed = threading.Condition()
        self._open = True
        self._waiting = False
        self._wire: Wire | None = None
        self._thread: threading.Thread | None = None

    def start(self, transfer: Transfer) -> None:
        """Queue it; REJECTED when too many wait, FAILED when the peer is gone."""
        with self._changed:
            if not self._open:
                transfer.end(Status.FAILED)
                return
            if len(self._queue) + (self._running is not None) >= self._max_transfers:
                transfer.end(Status.REJECTED)
                return
            if self._waiting and self._wire is not None and not self._queue:
                # While our thread wakes up the peer has something to do.
                transfer.sending = True
                transfer.left = self._wire.send_some(_message(transfer))
            self._queue.append(transfer)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def cancel(self, transfer: Transfer) -> None:
        """Want it no more: at once where nothing of it was sent."""
        with self._changed:
            transfer.cancelled = True
            if transfer.sending or transfer.answers is not None:
                return
            if transfer in self._queue:
                self._queue.remove(transfer)
            transfer.end(Status.TIMED_OUT)

    def cancel_all(self) -> list[Transfer]:
        """`cancel` all that have no answers yet; returns them."""
        with self._changed:
            running = [self._running] if self._running is not None else []
            found = running + list(self._queue)
            for transfer in found:
                self.cancel(transfer)
            return found

    def close(self) -> None:
        """End every transfer as FAILED."""
        with self._changed:
            self._open = False
            waiting = list(self._queue)
            self._queue.clear()
            if self._wire is not None:
                _shut(self._wire.sock)
            self._changed.notify_all()
        for transfer in waiting:
            transfer.end(Status.FAILED)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while self._open and not self._queue:
                    self._waiting = True
                    self._changed.wait()
                self._waiting = False
                if not self._open:
                    break
                transfer = self._running = self._queue.popleft()
            self._carry(transfer)
        self._drop()

    def _carry(self, transfer: Transfer) -> None:
        wire = self._ready(transfer)
        with self._changed:
            if transfer.answers is not None:
                return
            late = time.monotonic() >= transfer.deadline_s
            if wire is None or not self._open or (late and not transfer.sending):
                transfer.end(Status.TIMED_OUT if late and self._open else Status.FAILED)
                return
            transfer.sending = True
        wire.go_on = until(transfer.deadline_s, lambda: not transfer.cancelled)
        try:
            answers = _ask(wire, transfer)
        except Stopped:
            # The lane is in the middle of a message; the next transfer takes a new one.
            self._drop()
            transfer.end(Status.TIMED_OUT)
        except OSError:
            self._drop()
            transfer.end(Status.FAILED)
        else:
            transfer.end(Status.FAILED, answers)

    def _ready(self, transfer: Transfer) -> Wire | None:
        """The lane, which is made as it is first needed; None when there is none."""
        if self._wire is None:
            limit_s = time.monotonic() + LANE_TIMEOUT_S
            try:
                sock = self._connect(min(transfer.deadline_s, limit_s))
            except LMCacheError:
                return None
            with self._changed:
                self._wire = Wire(sock, lambda: None)
        return self._wire

    def _drop(self) -> None:
        with self._changed:
            if self._wire is not None:
                self._wire.sock.close()
                self._wire = None


def _message(transfer: Transfer) -> list[memoryview | bytes]:
    """Everything that is sent for it."""
    head = pack(transfer.request)
    return [head, *transfer.views] if transfer.request.op == WRITE else [head]


def _ask(wire: Wire, transfer: Transfer) -> list[Status]:
    views, count = transfer.views, len(transfer.views)
    wire.send(_message(transfer) if transfer.left is None else transfer.left)
    if transfer.request.op == WRITE:
        return wire.answers(count)
    coming = wire.answers(count)
    wire.receive_into([view for view, status in zip(views, coming) if status is Status.OK])
    return wire.answers(count)


class Answering:
    """One lane of a peer, whose requests touch what was granted to it.

    Args:
        notify: hands a notification to core.
    """

    def __init__(
        self,
        peer: str,
        sock: socket.socket,
        grants: Grants,
        *,
        notify: Callable[[bytes], None],
        max_pieces: int,
        max_message_bytes: int,
    ) -> None:
        self._peer = peer
        self._grants = grants
        self._notify = notify
        self._max_pieces = max_pieces
        self._max_message_bytes = max_message_bytes
        self._wire = Wire(sock, lambda: None)
        self._open = True

    def close(self) -> None:
        """End the lane; `run` returns soon."""
        self._open = False
        _shut(self._wire.sock)

    def run(self) -> None:
        """Answer until the lane ends.  One thread."""
        self._wire.go_on = self._check_open
        try:
            while self._open:
                self._serve()
        except (OSError, Stopped):
            pass  # the peer's own wait ends with the lane
        finally:
            self._wire.sock.close()

    def _check_open(self) -> None:
        if not self._open:
            raise Stopped

    def _serve(self) -> None:
        self._wire.idle()
        request = self._wire.request(
            max_pieces=self._max_pieces, max_message_bytes=self._max_message_bytes
        )
        access = Access.WRITE if request.op == WRITE else Access.READ
        spans = self._grants.enter(request.grant, self._peer, access, request.parts)
        views = [
            span.view[part.offset : part.offset + part.nbytes]
            if span is not None and span.view is not None
            else None
            for span, part in zip(spans, request.parts)
        ]
        stay = _Stay(self._grants, request.grant, entered=any(span is not None for span in spans))
        try:
            if request.op == WRITE:
                statuses = self._take(stay, views, request.parts)
            else:
                statuses = self._give(stay, views)
        finally:
            stay.leave()
        if request.notification and all(status is Status.OK for status in statuses):
            self._notify(request.notification)
        self._wire.answer(statuses)

    def _take(
        self, stay: _Stay, views: Sequence[memoryview | None], parts: Sequence[Part]
    ) -> list[Status]:
        """The bytes of a write, each piece into its span or nowhere."""
        wire = self._wire
        statuses: list[Status] = []
        at = 0
        while at < len(parts):
            end = at
            while end < len(parts) and views[end] is not None:
                end += 1
            run = [view for view in views[at:end] if view is not None]
            total = sum(view.nbytes for view in run)
            taken = self._take_run(run, stay)
            if taken == total:
                statuses += [Status.OK] * len(run)
            else:
                # The peer may stand still with the rest: the memory is free before it comes.
                stay.leave()
                wire.discard(total - taken)
                statuses += [Status.FAILED] * len(run)
            at = end
            if at < len(parts):
                wire.discard(parts[at].nbytes)
                statuses.append(Status.REJECTED)
                at += 1
        return statuses

    def _take_run(self, run: list[memoryview], stay: _Stay) -> int:
        """Fill spans while the grant lives; returns how many bytes were taken."""
        taken = 0
        for view in run:
            rest = view
            while rest.nbytes:
                if not stay.live():
                    return taken
                self._check_open()
                got = self._wire.take(rest)
                taken += got
                rest = rest[got:]
        return taken

    def _give(self, stay: _Stay, views: Sequence[memoryview | None]) -> list[Status]:
        """The bytes of a read; zeros in the place of what may no longer be read."""
        wire = self._wire
        statuses = [Status.OK if view is not None else Status.REJECTED for view in views]
        wire.answer(statuses)
        for at, view in enumerate(views):
            rest = view
            while rest is not None and rest.nbytes:
                if not stay.live():
                    stay.leave()
                    statuses[at] = Status.FAILED
                    wire.pad(rest.nbytes)
                    break
                self._check_open()
                try:
                    rest = rest[wire.sock.send(rest) :]
                except BlockingIOError:
                    continue
        return statuses


class _Stay:
    """Our touching of a grant's spans, from `Grants.enter` until we leave."""

    def __init__(self, grants: Grants, number: int, *, entered: bool) -> None:
        self._grants = grants
        self._number = number
        self._inside = entered

    def live(self) -> bool:
        """Whether the spans may still be touched."""
        return self._inside and self._grants.live(self._number)

    def leave(self) -> None:
        """Touch them no more.  Idempotent."""
        if self._inside:
            self._inside = False
            self._grants.leave(self._number)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
