"""What a lane of ``tcp://`` carries: one request after the other, each answered before the next.

A request is ``op, pieces, notification bytes, grant``, then span, offset and length of each piece,
then the notification, then (of a write) the pieces' bytes.  A write is answered by one byte a
piece; a read by one byte a piece, the bytes of those that are OK, and one byte a piece again, since
a grant may end meanwhile.  Bytes go between the socket and the memory that they belong to.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lmcache_core.sdk import Part, Status

WRITE, READ = 1, 2
ANSWERS = (Status.OK, Status.REJECTED, Status.FAILED)
SLICE_S = 0.05
"""How soon whoever waits for bytes looks whether it should go on."""
MAX_VECTORS = 64
NO_SPAN = (1 << 32) - 1
DISCARD_BYTES = 1 << 16

_SLICE = struct.pack("@ll", 0, int(SLICE_S * 1e6))
_HEAD = struct.Struct("<BxHIQ")
_PART = struct.Struct("<IQQ")
_TICKET = struct.Struct("<8sQ")
_TICKET_MAGIC = b"tcpgrant"


class Stopped(Exception):
    """Raised out of a wait for bytes: whoever waits should not go on."""


class Request(NamedTuple):
    """One request, as its target reads it."""

    op: int
    grant: int
    parts: list[Part]
    notification: bytes


def ticket_of(number: int) -> bytes:
    """What a peer shows to use grant ``number``."""
    return _TICKET.pack(_TICKET_MAGIC, number)


def number_of(ticket: bytes) -> int | None:
    """The grant's number, or None when it is no ticket."""
    if len(ticket) != _TICKET.size:
        return None
    magic, number = _TICKET.unpack(ticket)
    return int(number) if magic == _TICKET_MAGIC else None


def pack(request: Request) -> bytes:
    """Everything of a request before the pieces' bytes."""
    head = _HEAD.pack(request.op, len(request.parts), len(request.notification), request.grant)
    parts = b"".join(_PART.pack(*part) for part in request.parts)
    return head + parts + request.notification


class Wire:
    """A socket on which one thread sends and receives whole messages.

    Args:
        go_on: raises to end a wait; asked every `SLICE_S` and after each call of the system.
    """

    def __init__(self, sock: socket.socket, go_on: Callable[[], None]) -> None:
        self.sock = sock
        self.go_on = go_on
        self._scratch = memoryview(bytearray(DISCARD_BYTES))
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        # The kernel ends a wait: a timeout of Python's would poll before every call.
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SLICE)

    def idle(self) -> None:
        """Return when something can be received, or the connection ended."""
        self._readable.poll()

    def take(self, view: memoryview) -> int:
        """Receive into ``view``: all of it, or what comes in a slice of time.

        Raises:
            OSError: the connection ended.
        """
        try:
            got = self.sock.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            return 0
        if not got:
            raise ConnectionError("the peer ended the lane")
        return got

    def receive(self, nbytes: int) -> bytes:
        """So many bytes.

        Raises:
            OSError: the connection ended.
        """
        data = bytearray(nbytes)
        self.receive_into([memoryview(data)])
        return bytes(data)

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill every view, in order."""
        left = [view for view in views if view.nbytes]
        while left:
            self.go_on()
            if len(left) == 1:
                left = _after(left, self.take(left[0]))
                continue
            try:
                got = self.sock.recvmsg_into(left[:MAX_VECTORS], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue
            if not got:
                raise ConnectionError("the peer ended the lane")
            left = _after(left, got)

    def discard(self, nbytes: int) -> None:
        """Take so many bytes and keep none."""
        while nbytes:
            self.go_on()
            nbytes -= self.take(self._scratch[: min(nbytes, DISCARD_BYTES)])

    def send_some(self, views: Sequence[memoryview | bytes]) -> list[memoryview]:
        """Send what the system takes at once; returns what is left.  An error is left to `send`."""
        left = [memoryview(view) for view in views if len(view)]
        try:
            sent = self.sock.sendmsg(left[:MAX_VECTORS], (), socket.MSG_DONTWAIT)
        except OSError:
            return left
        return _after(left, sent)

    def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Send every view, in order."""
        left = [memoryview(view) for view in views if len(view)]
        while left:
            self.go_on()
            try:
                sent = self.sock.sendmsg(left[:MAX_VECTORS])
            except BlockingIOError:
                continue
            left = _after(left, sent)

    def pad(self, nbytes: int) -> None:
        """Send so many zeros."""
        zeros = bytes(min(nbytes, DISCARD_BYTES))
        while nbytes:
            part = zeros[: min(nbytes, len(zeros))]
            self.send([part])
            nbytes -= len(part)

    def request(self, *, max_pieces: int, max_message_bytes: int) -> Request:
        """The next one.

        Raises:
            ConnectionError: what came is none, or the connection ended.
        """
        op, count, length, grant = _HEAD.unpack(self.receive(_HEAD.size))
        if op not in (WRITE, READ) or count > max_pieces or length > max_message_bytes:
            raise ConnectionError("a request that is none")
        rest = self.receive(count * _PART.size + length)
        parts = [Part(*_PART.unpack_from(rest, at * _PART.size)) for at in range(count)]
        return Request(op, grant, parts, rest[count * _PART.size :])

    def answers(self, count: int) -> list[Status]:
        """One status a piece."""
        codes = self.receive(count)
        return [ANSWERS[code] if code < len(ANSWERS) else Status.FAILED for code in codes]

    def answer(self, statuses: Sequence[Status]) -> None:
        """Send one status a piece."""
        self.send([bytes(ANSWERS.index(status) for status in statuses)])


def until(deadline_s: float, wanted: Callable[[], bool]) -> Callable[[], None]:
    """A ``go_on`` that ends at the deadline, or when it is wanted no more."""

    def go_on() -> None:
        if time.monotonic() >= deadline_s or not wanted():
            raise Stopped

    return go_on


def _after(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of ``views`` behind the first ``nbytes``."""
    for at, view in enumerate(views):
        if nbytes < view.nbytes:
            return [view[nbytes:], *views[at + 1 :]]
        nbytes -= view.nbytes
    return []
