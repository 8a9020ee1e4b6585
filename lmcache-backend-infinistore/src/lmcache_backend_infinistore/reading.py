"""Reads over TCP, in the words of InfiniStore 0.2.35, straight to where the bytes belong.

The library's own read waits for ever for a name that is absent, ends its process when the server
dies, and gives memory of its own, which costs its pages and a copy.  These share the library's
connection, between its calls.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

FINISHED, ABSENT = 200, 404
"""Answers."""
_REQUEST = struct.Struct("<IcI")
_MAGIC = 0xDEADBEEF
_LAYOUT = bytes.fromhex("10000000 00000a00 10000800 0c000700 0a000000 000000")
_FIELDS = struct.Struct("<cIII")
"""The rest of a flatbuffer up to the name: operation, a mark, bytes of the value, of the name."""
_MARK = 8
_NUMBER = struct.Struct("<I")
LONG_BYTES = 1 << 20
"""A longer value the server sends in several turns of its loop; see `settle`."""
_STEP_BYTES = 256 << 10
"""Received and looked at in turn, while it is in the processor's cache."""


class Lost(Exception):
    """The server does not answer any more, or never did."""


def request(kind: bytes, body: bytes) -> bytes:
    """A message to the server."""
    return _REQUEST.pack(_MAGIC, kind, len(body)) + body


def value_request(op: bytes, name: str, nbytes: int = 0) -> bytes:
    """``G`` for the value of ``name``, or ``P`` for storing ``nbytes`` bytes that follow."""
    key = name.encode()
    fields = _FIELDS.pack(op, _MARK, nbytes, len(key))
    return request(b"L", _LAYOUT + fields + key + bytes(4 - len(key) % 4))


def ask(sock: socket.socket, name: str) -> int | None:
    """Ask for ``name``: the size of its bytes, which `receive` must take; None when absent.

    Raises:
        Lost: the server hung up, or refuses.
    """
    try:
        sock.sendall(value_request(b"G", name))
    except OSError as error:
        raise Lost(f"a read can't be asked for: {error}") from error
    code = number(sock)
    if code == ABSENT:
        return None
    if code != FINISHED:
        raise Lost(f"a read is answered by {code}")
    return number(sock)


def receive(
    sock: socket.socket, target: memoryview, take: Callable[[memoryview], object] = bool
) -> None:
    """Fill ``target``; ``take`` gets each piece as it comes.

    Raises:
        Lost: the server hung up.
    """
    at = 0
    while at < len(target):
        try:
            count = sock.recv_into(target[at : at + _STEP_BYTES])
            # The server holds the last short piece back until the others are acknowledged, which
            # the kernel would do after 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError as error:
            raise Lost(f"a read broke off: {error}") from error
        if not count:
            raise Lost("the server hung up during a read")
        take(target[at : at + count])
        at += count


def settle(other: socket.socket) -> None:
    """Ask something over ``other``, a second connection, after a long value came over the first.

    The server answers a request that it gets before it has put that value away with the same bytes
    again and again, for ever.  It does so before it looks at what came after the answer here.

    Raises:
        Lost: it does not answer.
    """
    try:
        other.sendall(request(b"C", b"lmc"))
    except OSError as error:
        raise Lost(f"the second connection broke: {error}") from error
    number(other)
    number(other)


def skip(sock: socket.socket, nbytes: int) -> None:
    """Throw away ``nbytes`` bytes that were asked for."""
    room = memoryview(bytearray(min(nbytes, _STEP_BYTES)))
    for left in range(nbytes, 0, -_STEP_BYTES):
        receive(sock, room[:left])


def number(sock: socket.socket) -> int:
    """The next number of an answer.

    Raises:
        Lost: the server hung up.
    """
    room = memoryview(bytearray(_NUMBER.size))
    receive(sock, room)
    return int(_NUMBER.unpack(room)[0])
