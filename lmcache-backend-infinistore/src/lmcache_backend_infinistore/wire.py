"""What connector and helper say to each other, over a unix socket that keeps message bounds.

A request is one message: `Op`, then its items.  The helper does them in turn and notes each one's
outcome on the board, a page of memory that both have mapped; then it sends one `Reply`.  What a
killed helper has done can so be read off the board.  `Op.MAP`, `UNMAP` and `DROP` are
not replied to: the next reply says that they are done, too.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_backend_infinistore.layout import VERSION_BYTES

BOARD_BYTES = 4096
MAX_ITEMS = 64
MAX_MESSAGE_BYTES = 64 << 10
OWN_MAP = 0
"""Map of the helper's own memory: the board, then room for values that lie in no region."""

_ITEM = struct.Struct(f"<BIQQ{VERSION_BYTES}s")
_ENTRY = struct.Struct(f"<BB6xQ{VERSION_BYTES}s4x")
_MAP = struct.Struct("<IQ")


class Op(enum.IntEnum):
    """What is asked of a helper."""

    HELLO = 1
    MAP = 2
    UNMAP = 3
    EXISTS = 4
    GET = 5
    PUT = 6
    DELETE = 7
    SWEEP = 8
    """Names whose put may have broken off: overwrite, then delete."""
    DROP = 9
    """Payloads that no head names any more: delete."""
    COVER = 10
    """Names whose put may have broken off: overwrite."""


class Reply(enum.IntEnum):
    """First byte of what a helper says; the rest is text."""

    READY = 1
    DONE = 2
    LOST = 3
    """The server can't be reached; the helper ends."""
    BROKEN = 4
    """The library can't work here as it is set up; the helper ends."""


class Code(enum.IntEnum):
    """Outcome of one item."""

    NONE = 0
    OK = 1
    MISS = 2
    REJECTED = 3
    SIZE_MISMATCH = 4
    CORRUPT = 5
    FAILED = 6


class Phase(enum.IntEnum):
    """How far a put has come."""

    BEFORE = 0
    PAYLOAD = 1
    HEAD = 2


@dataclass(frozen=True, slots=True)
class Item:
    """One key of a request, or a bare name of `Op.SWEEP` and `Op.DROP`.

    Attributes:
        key: the key; the name for the last three.
        map_id, offset, nbytes: the buffer.
        version: of a put.
    """

    key: bytes
    map_id: int = OWN_MAP
    offset: int = 0
    nbytes: int = 0
    version: bytes = bytes(VERSION_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the board.

    Attributes:
        nbytes: size of the value that was found.
        old: version that a put or delete has replaced; zeros when none.
    """

    code: Code = Code.NONE
    phase: Phase = Phase.BEFORE
    nbytes: int = 0
    old: bytes = bytes(VERSION_BYTES)


def request(op: Op, items: Sequence[Item]) -> bytes:
    """A message; at most `MAX_ITEMS` items."""
    parts = [bytes([op])]
    for item in items:
        parts.append(_ITEM.pack(len(item.key), item.map_id, item.offset, item.nbytes, item.version))
        parts.append(item.key)
    return b"".join(parts)


def items_of(message: memoryview) -> list[Item]:
    """The items of a `request`."""
    items, at = [], 1
    while at < len(message):
        length, map_id, offset, nbytes, version = _ITEM.unpack_from(message, at)
        at += _ITEM.size
        items.append(Item(bytes(message[at : at + length]), map_id, offset, nbytes, version))
        at += length
    return items


def map_request(op: Op, map_id: int, nbytes: int) -> bytes:
    """`Op.MAP` (with one descriptor beside it) or `Op.UNMAP`."""
    return bytes([op]) + _MAP.pack(map_id, nbytes)


def map_of(message: memoryview) -> tuple[int, int]:
    """Map and size of a `map_request`."""
    map_id, nbytes = _MAP.unpack_from(message, 1)
    return map_id, nbytes


def note(board: memoryview, index: int, entry: Entry) -> None:
    """Write line ``index`` of the board."""
    _ENTRY.pack_into(
        board, index * _ENTRY.size, entry.code, entry.phase, entry.nbytes, entry.old
    )  # fmt: skip


def read_board(board: memoryview, count: int) -> list[Entry]:
    """The first ``count`` lines of the board."""
    found = []
    for index in range(count):
        code, phase, nbytes, old = _ENTRY.unpack_from(board, index * _ENTRY.size)
        found.append(Entry(Code(code), Phase(phase), nbytes, old))
    return found
