"""How a value lies in an object: a header that says its size and checksum, then its bytes.

The plugin calls a read beyond an object's end done, so the object itself must say how long it is.
"""

from __future__ import annotations

import struct

import xxhash

_HEADER = struct.Struct("<4sIQ16s32x")
_MAGIC, _FORMAT = b"LMO1", 1
HEADER_BYTES = _HEADER.size


class NotWhole(Exception):
    """The object is no value, or not the whole bytes of one put."""


def seal(frame: memoryview, nbytes: int) -> None:
    """Write the header of the ``nbytes`` that follow it in ``frame``."""
    payload = frame[HEADER_BYTES : HEADER_BYTES + nbytes]
    digest = xxhash.xxh3_128_digest(payload)
    _HEADER.pack_into(frame, 0, _MAGIC, _FORMAT, nbytes, digest)


def size_in(frame: memoryview) -> int:
    """Size in bytes that the header says.

    Raises:
        NotWhole: it is no header.
    """
    magic, version, nbytes, _ = _HEADER.unpack_from(frame)
    if magic != _MAGIC or version != _FORMAT:
        raise NotWhole("no header")
    return int(nbytes)


def payload_in(frame: memoryview) -> memoryview:
    """The bytes of the value in ``frame``, verified.

    Raises:
        NotWhole: they are not what was put.
    """
    nbytes = size_in(frame)
    payload = frame[HEADER_BYTES : HEADER_BYTES + nbytes]
    digest = _HEADER.unpack_from(frame)[3]
    if len(payload) != nbytes or xxhash.xxh3_128_digest(payload) != digest:
        raise NotWhole("checksum")
    return payload
