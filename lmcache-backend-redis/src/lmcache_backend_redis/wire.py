"""RESP2 on a connected socket: values go from and into the caller's memory, without a copy.

Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/.  After any exception
except `ServerError` the stream is out of step and the wire must be closed.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Protocol

Part = bytes | memoryview

_LINE_LIMIT = 64 << 10
_IOV_LIMIT = 512
CRLF = b"\r\n"
NIL = b"$-1\r\n"


class ServerError(Exception):
    """An error reply: the first word is Redis's code, such as ``OOM`` or ``NOAUTH``."""

    @property
    def code(self) -> str:
        """The reply's first word."""
        return str(self).partition(" ")[0]


Reply = bytes | int | list[Any] | ServerError | None
"""One reply; an array's members are replies."""


class WrongSize(Exception):
    """A stored string has another length than expected."""


def command(*args: Part | int) -> bytes:
    """One command; every argument is short."""
    parts = [b"*%d\r\n" % len(args)]
    for arg in args:
        data = b"%d" % arg if isinstance(arg, int) else bytes(arg)
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


class Wire(Protocol):
    """Requests out, replies in, each call bounded by an absolute deadline (monotonic s).

    Every method raises TimeoutError past its deadline and OSError when the peer is gone.
    """

    def send(self, parts: Sequence[Part], deadline_s: float) -> None:
        """Send all of ``parts``."""
        ...

    def receive(self, targets: Sequence[memoryview], deadline_s: float) -> None:
        """Fill all of ``targets``."""
        ...

    def receive_some(self, target: memoryview, deadline_s: float) -> int:
        """Read what there is into ``target``, at least one byte."""
        ...

    def close(self) -> None:
        """Close the socket."""
        ...


class PlainWire:
    """TCP and unix sockets.  The kernel keeps the time, so a call that moves megabytes is
    one system call and takes the interpreter's lock once."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._sock = sock

    def send(self, parts: Sequence[Part], deadline_s: float) -> None:
        left = [memoryview(part) for part in parts]
        while left:
            self._arm(socket.SO_SNDTIMEO, deadline_s)
            try:
                count = self._sock.sendmsg(left[:_IOV_LIMIT])
            except BlockingIOError:
                raise TimeoutError("the store takes no data") from None
            left = _rest(left, count)

    def receive(self, targets: Sequence[memoryview], deadline_s: float) -> None:
        left = list(targets)
        while left:
            self._arm(socket.SO_RCVTIMEO, deadline_s)
            try:
                count = self._sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                raise TimeoutError("the store does not answer") from None
            if not count:
                raise ConnectionResetError("the store closed the connection")
            left = _rest(left, count)

    def receive_some(self, target: memoryview, deadline_s: float) -> int:
        self._arm(socket.SO_RCVTIMEO, deadline_s)
        try:
            count = self._sock.recv_into(target)
        except BlockingIOError:
            raise TimeoutError("the store does not answer") from None
        if not count:
            raise ConnectionResetError("the store closed the connection")
        return count

    def close(self) -> None:
        self._sock.close()

    def _arm(self, option: int, deadline_s: float) -> None:
        left_s = _left_s(deadline_s)
        whole = int(left_s)
        # A zero would mean "for ever".
        micros = max(1, int((left_s - whole) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, micros))


class TlsWire:
    """A socket wrapped in TLS, which has neither scatter and gather nor kernel time-outs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, parts: Sequence[Part], deadline_s: float) -> None:
        for part in parts:
            self._sock.settimeout(_left_s(deadline_s))
            self._sock.sendall(part)

    def receive(self, targets: Sequence[memoryview], deadline_s: float) -> None:
        left = list(targets)
        while left:
            left = _rest(left, self.receive_some(left[0], deadline_s))

    def receive_some(self, target: memoryview, deadline_s: float) -> int:
        self._sock.settimeout(_left_s(deadline_s))
        count = self._sock.recv_into(target)
        if not count:
            raise ConnectionResetError("the store closed the connection")
        return count

    def close(self) -> None:
        self._sock.close()


class Session:
    """Replies of one connection.  Not thread-safe."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = memoryview(bytearray(_LINE_LIMIT))
        self._start = self._end = 0
        self._small = memoryview(bytearray(32))

    def send(self, parts: Sequence[Part], deadline_s: float) -> None:
        """Send whole commands."""
        self._wire.send(parts, deadline_s)

    def reply(self, deadline_s: float) -> Reply:
        """The next reply; an error inside an array, or alone, comes as a value."""
        line = self._line(deadline_s)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"-":
            return ServerError(rest.decode(errors="replace"))
        if kind == b"$":
            return None if rest == b"-1" else self._string(int(rest), deadline_s)
        if kind == b"*":
            return None if rest == b"-1" else [self.reply(deadline_s) for _ in range(int(rest))]
        raise ConnectionError("the peer does not speak RESP2")

    def ok(self, deadline_s: float) -> None:
        """The next reply, which must be OK; not a byte more is read, so `value_into` may follow."""
        assert self._start == self._end, "a reply was left unread"
        head = self._small[:5]
        self._wire.receive([head], deadline_s)
        if bytes(head) != b"+OK\r\n":
            raise ConnectionError("a reply of another kind where OK was due")

    def value_into(self, target: memoryview, deadline_s: float) -> bool:
        """The next reply, a string of exactly ``len(target)`` bytes; False when it is nil.

        Raises:
            WrongSize: a string of another length.  The wire must be closed.
            ServerError: an error reply.  Then, too, when more replies are on their way.
        """
        assert self._start == self._end, "a reply was left unread"
        expected = b"$%d\r\n" % len(target)
        head = self._small[:4]
        self._wire.receive([head], deadline_s)
        if head == expected[:4]:
            rest, end = self._small[4 : len(expected)], self._small[-2:]
            # The whole length first: a shorter value would keep us waiting for its rest.
            if len(rest):
                self._wire.receive([rest], deadline_s)
            if rest != expected[4:]:
                raise WrongSize("a piece has another length than its head says")
            self._wire.receive([target, end] if len(target) else [end], deadline_s)
            if end == CRLF:
                return True
            raise ConnectionError("the peer does not speak RESP2")
        if head == NIL[:4]:
            # Not a byte more: the next reply may be here already.
            self._wire.receive([self._small[4:5]], deadline_s)
            return False
        if bytes(head[:1]) == b"$":
            raise WrongSize("a piece has another length than its head says")
        self._buffer[:4] = head
        self._start, self._end = 0, 4
        answer = self.reply(deadline_s)
        if isinstance(answer, ServerError):
            raise answer
        raise ConnectionError("the peer does not speak RESP2")

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()

    def _line(self, deadline_s: float) -> bytes:
        seen = 0
        while True:
            have = bytes(self._buffer[self._start + seen : self._end])
            at = have.find(CRLF)
            if at >= 0:
                line = bytes(self._buffer[self._start : self._start + seen + at])
                self._start += seen + at + 2
                return line
            seen = max(0, self._end - self._start - 1)
            self._fill(deadline_s)

    def _string(self, nbytes: int, deadline_s: float) -> bytes:
        if nbytes > _LINE_LIMIT - 2:
            raise ConnectionError(f"a reply of {nbytes} bytes where a short one was due")
        while self._end - self._start < nbytes + 2:
            self._fill(deadline_s)
        data = bytes(self._buffer[self._start : self._start + nbytes])
        self._start += nbytes + 2
        return data

    def _fill(self, deadline_s: float) -> None:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and self._end == len(self._buffer):
            left = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(left)] = left
            self._start, self._end = 0, len(left)
        if self._end == len(self._buffer):
            raise ConnectionError("a reply line is too long")
        self._end += self._wire.receive_some(self._buffer[self._end :], deadline_s)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the deadline has passed")
    return left_s


def _rest(parts: list[memoryview], count: int) -> list[memoryview]:
    """``parts`` without their first ``count`` bytes."""
    for position, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[position + 1 :]]
        count -= len(part)
    return []
