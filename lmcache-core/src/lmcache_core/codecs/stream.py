"""The stream of `cachegen`: what stands where.  Little-endian; in the order of the stream.

- header (`_HEADER`): magic, version (2 bytes), level, element type, elements (8), then how many
  runs, patches, bytes of tables (4 each) and words (8) follow
- where each run ends among the words: 4 bytes each.  Runs: symbols of channels, symbols of
  tokens (`planes`), then one for every plane
- patches: index of an element (4), the difference in place of its symbol's (4, signed)
- tables, as many as the version says: first symbol, last symbol (1, 0 for an unused table), then
  frequencies out of 4096 in one byte, or in two with the highest bit set
- words of the coder, 2 bytes each
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcache_core.sdk.codec import CannotDecode

NAME = "cachegen"
VERSION = 1
SYMBOLS = 256
_MAGIC = b"LMCG"
_HEADER = struct.Struct("<4sHBBQIIIQ")
_PATCH = np.dtype([("at", "<u4"), ("by", "<i4")])
_TOTAL = 1 << 12
_LONG = 0x80


class Parts(NamedTuple):
    """A stream taken apart.

    Attributes:
        level, kind, elements: of the header.
        ends: i64 ``[runs]``, of each run in ``words``.
        patches: i64 ``[n, 2]``: index of an element, difference.
        table: u16 ``[tables, SYMBOLS]``, frequencies.
        words: u16.
    """

    level: int
    kind: int
    elements: int
    ends: NDArray[np.int64]
    patches: NDArray[np.int64]
    table: NDArray[np.uint16]
    words: NDArray[np.uint16]


def write(parts: Parts, target: memoryview) -> int:
    """Length of the stream; -1 when it is longer than ``target``, which is then undefined."""
    tables = _tables_to_bytes(parts.table)
    patches = np.empty(len(parts.patches), _PATCH)
    patches["at"], patches["by"] = parts.patches[:, 0], parts.patches[:, 1]
    head = b"".join(
        (
            _HEADER.pack(
                _MAGIC, VERSION, parts.level, parts.kind, parts.elements, len(parts.ends),
                len(patches), len(tables), len(parts.words),
            ),
            parts.ends.astype("<u4").tobytes(),
            patches.tobytes(),
            tables,
        )
    )  # fmt: skip
    nbytes = len(head) + parts.words.nbytes
    if nbytes > len(target):
        return -1
    target[: len(head)] = head
    out = np.frombuffer(target, np.uint8)
    np.copyto(out[len(head) : nbytes], parts.words.view(np.uint8))
    return nbytes


def read(source: memoryview, *, kind: int, elements: int, runs: int, tables: int, spare: int,
         room: NDArray[np.uint16]) -> Parts:  # fmt: skip
    """Take a stream apart and check every number in it.

    Args:
        kind, elements, runs: what it must hold.
        tables: rows of the table.
        spare: zeros that are put behind the words.
        room: for the words, at least half of the source's length and ``spare``.

    Raises:
        CannotDecode: see there.
    """
    if len(source) < _HEADER.size or bytes(source[:4]) != _MAGIC:
        raise _damaged("not a stream of this codec")
    version = int.from_bytes(source[4:6], "little")
    if version != VERSION:
        raise CannotDecode("version", f"stream of version {version}, not {VERSION}", codec=NAME)
    found = _HEADER.unpack_from(source)
    _, _, level, found_kind, found_elements, found_runs, patched, tabled, words = found
    if (found_kind, found_elements, found_runs) != (kind, elements, runs):
        raise _damaged("a stream of another shape")
    patches_at = _HEADER.size + 4 * runs
    tables_at = patches_at + _PATCH.itemsize * patched
    words_at = tables_at + tabled
    if words_at + 2 * words != len(source):
        raise _damaged(f"{len(source)} bytes are not its length")
    ends = np.frombuffer(source, "<u4", runs, _HEADER.size).astype(np.int64)
    if runs and (np.any(np.diff(ends, prepend=0) < 0) or ends[-1] != words):
        raise _damaged("runs out of order")
    patches = np.empty((patched, 2), np.int64)
    raw = np.frombuffer(source, _PATCH, patched, patches_at)
    patches[:, 0], patches[:, 1] = raw["at"], raw["by"]
    if patched and (np.any(np.diff(patches[:, 0]) <= 0) or patches[-1, 0] >= elements):
        raise _damaged("patches out of order")
    table = _tables_from_bytes(bytes(source[tables_at:words_at]), tables)
    room[words : words + spare] = 0
    np.copyto(room[:words].view(np.uint8), np.frombuffer(source, np.uint8, 2 * words, words_at))
    return Parts(level, kind, elements, ends, patches, table, room[: words + spare])


def _tables_to_bytes(table: NDArray[np.uint16]) -> bytes:
    out = bytearray()
    for row in table:
        used = np.flatnonzero(row)
        if not len(used):
            out += b"\1\0"
            continue
        first, last = int(used[0]), int(used[-1])
        out += bytes((first, last))
        for share in row[first : last + 1].tolist():
            if share >= _LONG:
                out += bytes((_LONG | share >> 8, share & 0xFF))
            else:
                out.append(share)
    return bytes(out)


def _tables_from_bytes(data: bytes, tables: int) -> NDArray[np.uint16]:
    table = np.zeros((tables, SYMBOLS), np.uint16)
    at = 0
    try:
        for row in table:
            first, last = data[at], data[at + 1]
            at += 2
            shares: list[int] = []
            for _ in range(first, last + 1):
                share = data[at]
                at += 1
                if share >= _LONG:
                    share = (share & ~_LONG) << 8 | data[at]
                    at += 1
                shares.append(share)
            if shares and sum(shares) != _TOTAL:
                raise _damaged("a table that does not add up")
            row[first : first + len(shares)] = shares
    except IndexError:
        raise _damaged("a table is cut") from None
    if at != len(data):
        raise _damaged("more than its tables")
    return table


def _damaged(message: str) -> CannotDecode:
    return CannotDecode("stream", message, codec=NAME)
