"""Reads over TCP, in the words of InfiniStore 0.2.35, straight to where the bytes belong.

The library's own read waits for ever for a name that is absent, ends its process when the server
dies, and gives memory of its own, which costs its pages and a copy.  These share the library's
connection, between its calls.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

_REQUEST = struct.Struct("<IcI")
_MAGIC, _PAYLOAD = 0xDEADBEEF, b"L"
_GET = bytes.fromhex("10000000 00000a00 10000800 0c000700 0a000000 00000047 08000000 00000000")
"""A flatbuffer as far as the name: its layout, the operation ``G``, and no length."""
_NUMBER = struct.Struct("<I")
_FOUND, _ABSENT = 200, 404
_STEP_BYTES = 256 << 10
"""Received and looked at in turn, while it is in the processor's cache."""


class Lost(Exception):
    """The server does not answer any more, or never did."""


def ask(sock: socket.socket, name: str) -> int | None:
    """Ask for ``name``: the size of its bytes, which `receive` must take; None when absent.

    Raises:
        Lost: the server hung up, or refuses.
    """
    key = name.encode()
    body = _GET + _NUMBER.pack(len(key)) + key + bytes(4 - len(key) % 4)
    try:
        sock.sendall(_REQUEST.pack(_MAGIC, _PAYLOAD, len(body)) + body)
    except OSError as error:
        raise Lost(f"a read can't be asked for: {error}") from error
    code = _number(sock)
    if code == _ABSENT:
        return None
    if code != _FOUND:
        raise Lost(f"a read is answered by {code}")
    return _number(sock)


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


def skip(sock: socket.socket, nbytes: int) -> None:
    """Throw away ``nbytes`` bytes that were asked for."""
    room = memoryview(bytearray(min(nbytes, _STEP_BYTES)))
    for left in range(nbytes, 0, -_STEP_BYTES):
        receive(sock, room[:left])


def _number(sock: socket.socket) -> int:
    room = memoryview(bytearray(_NUMBER.size))
    receive(sock, room)
    return int(_NUMBER.unpack(room)[0])
