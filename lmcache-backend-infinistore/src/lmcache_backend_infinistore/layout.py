"""How one value lies in InfiniStore: a small head, and a payload under a name of its own.

``lmc:HEX(key)`` is the head; ``lmc:HEX(key):HEX(version)`` is the payload of one put.  The server
publishes a name before its bytes have arrived, and dies when such a name is read or deleted.  So
no name is read before its put was acknowledged: a payload's name is random and told by a head
only, and a head is so short that it arrives in one piece.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

import xxhash

VERSION_BYTES = 12
_HEAD = struct.Struct("<4s12sQQ16s")
_MAGIC = b"LMI1"
HEAD_BYTES = _HEAD.size + 8
GONE = b"\0"
"""What a name holds for a moment before it is deleted; see `Leftovers`."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a reader must know before it reads the payload.

    Attributes:
        version: `VERSION_BYTES` random bytes, new for every put.
        nbytes: size of the value.
        checksum: xxh3_64 of the value.
    """

    version: bytes
    nbytes: int
    checksum: int

    @classmethod
    def decode(cls, key: bytes, data: bytes) -> Head | None:
        """The head of ``key`` in ``data``, or None when it is not one."""
        if len(data) != HEAD_BYTES:
            return None
        body, seal = data[:-8], data[-8:]
        magic, version, nbytes, checksum, owner = _HEAD.unpack(body)
        if magic != _MAGIC or owner != _digest(key) or seal != xxhash.xxh3_64_digest(body):
            return None
        return cls(version, nbytes, checksum)

    def encode(self, key: bytes) -> bytes:
        """The head as it is stored."""
        body = _HEAD.pack(_MAGIC, self.version, self.nbytes, self.checksum, _digest(key))
        return body + xxhash.xxh3_64_digest(body)


def new_version() -> bytes:
    """The version of a new put."""
    return secrets.token_bytes(VERSION_BYTES)


def head_name(key: bytes) -> str:
    """Name of the head of ``key``."""
    return f"lmc:{key.hex()}"


def payload_name(key: bytes, version: bytes) -> str:
    """Name of the payload of one put of ``key``."""
    return f"lmc:{key.hex()}:{version.hex()}"


def _digest(key: bytes) -> bytes:
    return xxhash.xxh3_128_digest(key)
