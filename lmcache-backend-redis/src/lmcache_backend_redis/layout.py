"""How one value lies in Redis: a small head, and pieces under a random version.

``lmc:{HEX(key)}`` is the head; ``lmc:{HEX(key)}:VERSION:i`` are the pieces, i from 0.  The
braces are Redis Cluster's hash tag: head and pieces live on one node.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

_HEAD = struct.Struct("<4s16sQI")
_MAGIC = b"LMH1"
_PREFIX = b"lmc:{"
MAX_PIECES = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """What a reader must know before it reads pieces.

    Attributes:
        version: 16 random bytes, new for every put.
        nbytes: size of the value.
        pieces: how many there are; all but the last are equally long.
    """

    version: bytes
    nbytes: int
    pieces: int

    @classmethod
    def new(cls, nbytes: int, max_piece_bytes: int) -> Head:
        """A head under a new version."""
        return cls(secrets.token_bytes(16), nbytes, -(-nbytes // max_piece_bytes))

    @classmethod
    def decode(cls, data: bytes) -> Head | None:
        """The head in ``data``, or None when it is not one."""
        if len(data) != _HEAD.size:
            return None
        magic, version, nbytes, pieces = _HEAD.unpack(data)
        sane = (
            magic == _MAGIC and pieces <= min(nbytes, MAX_PIECES) and bool(nbytes) == bool(pieces)
        )
        return cls(version, nbytes, pieces) if sane else None

    def encode(self) -> bytes:
        """The head as it is stored."""
        return _HEAD.pack(_MAGIC, self.version, self.nbytes, self.pieces)

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each piece in the value."""
        if not self.pieces:
            return []
        step = -(-self.nbytes // self.pieces)
        return [(at, min(at + step, self.nbytes)) for at in range(0, self.nbytes, step)]

    def names(self, key: bytes) -> list[bytes]:
        """Names of the pieces."""
        base = head_name(key) + b":" + self.version.hex().encode() + b":"
        return [base + b"%d" % i for i in range(len(self.spans()))]


def head_name(key: bytes) -> bytes:
    """Name of the head of ``key``."""
    return _PREFIX + key.hex().encode() + b"}"


def head_pattern(prefix: bytes) -> bytes:
    """SCAN pattern of every head whose key starts with ``prefix``."""
    return _PREFIX + prefix.hex().encode() + b"*}"


def key_of(name: bytes) -> bytes | None:
    """The key whose head is ``name``, which a `head_pattern` matches; None when it is no key's."""
    try:
        return bytes.fromhex(name[len(_PREFIX) : -1].decode("ascii"))
    except ValueError:
        return None
