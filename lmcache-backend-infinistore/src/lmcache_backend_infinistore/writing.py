"""Writes over TCP, in the words of InfiniStore 0.2.35, straight from where the bytes lie.

The library's own write is one call: a checksum could only be made before or after it, and what else
must be asked is a round trip of its own.  These share the library's connection, between its calls.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from lmcache_backend_infinistore import reading
from lmcache_backend_infinistore.reading import Lost

_NO_ROOM = 507
_THERE = 0
_STEP_BYTES = 60 << 10
"""Looked at and sent in turn, while it is in the processor's cache.  It fits the largest segment
that TCP makes, and what the server reads at once: else a put takes a fifth longer."""


def store(sock: socket.socket, name: str, content: bytes) -> bool:
    """Store ``content``, which is short and travels whole or not; False when there is no room.

    Raises:
        Lost: not acknowledged.
    """
    # In one piece with its request: half a head would kill the server.
    _send(sock, reading.value_request(b"P", name, len(content)) + content)
    return _stored(sock)


def store_payload(
    sock: socket.socket, name: str, source: memoryview, take: Callable[[memoryview], object],
    other: str,
) -> tuple[bool, bool]:  # fmt: skip
    """Store ``source``; ``take`` gets each piece before it leaves.

    Returns:
        Whether there was room, and whether the name ``other`` was there before.

    Raises:
        Lost: not acknowledged.
    """
    # Both answers come at once.  Not so for a read: its server would not go on to the next request.
    asked = reading.request(b"C", other.encode())
    whole = _send(sock, asked + reading.value_request(b"P", name, len(source)))
    for at in range(0, len(source), _STEP_BYTES):
        piece = source[at : at + _STEP_BYTES]
        take(piece)
        whole = whole and _send(sock, piece)
    code = reading.number(sock)
    if code != reading.FINISHED:
        raise Lost(f"a question is answered by {code}")
    there = reading.number(sock) == _THERE
    return _stored(sock), there


def _send(sock: socket.socket, data: bytes | memoryview) -> bool:
    """False when the server has hung up; what it said before that can still be read."""
    try:
        sock.sendall(data)
    except OSError:
        return False
    return True


def _stored(sock: socket.socket) -> bool:
    code = reading.number(sock)
    if code not in (reading.FINISHED, _NO_ROOM):
        raise Lost(f"a write is answered by {code}")
    return code == reading.FINISHED
