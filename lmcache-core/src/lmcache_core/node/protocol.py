"""What a node server and its clients say: frames of msgpack over a stream socket.

A frame is its length (u32, little-endian) and one tagged array.  Everything that a client says
but `Hello`, `Prefetch`, `Reserve` and `Ask` has no answer.  Keys travel joined, offsets as
packed 64-bit numbers, so that a long prefix costs no object a chunk.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterable
from importlib import metadata
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from lmcache_core.keys import STORED_KEY_BYTES
from lmcache_core.layout import LayoutSpec
from lmcache_core.sdk import LMCacheError

VERSION = 1
MAX_FRAME_BYTES = 4 << 20
MAX_KEYS = 65_536
MAX_WANTED = 16_384
MAX_LAYOUTS = 64
MAX_DEADLINE_S = 3600.0
MAX_TEXT = 4096
NO_SLOT = {"present": (1 << 64) - 1, "arriving": (1 << 64) - 2, "no_room": (1 << 64) - 3}
"""What stands in the place of an offset: `lmcache_core.cache.Refusal`, by value."""
Role = Literal["engine", "worker", "control"]

_LENGTH = struct.Struct("<I")

Key = Annotated[bytes, Meta(min_length=STORED_KEY_BYTES, max_length=STORED_KEY_BYTES)]
Keys = Annotated[bytes, Meta(max_length=MAX_KEYS * STORED_KEY_BYTES)]
Offsets = Annotated[bytes, Meta(max_length=MAX_KEYS * 8)]
Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, Meta(gt=0, le=MAX_DEADLINE_S)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]


class ProtocolError(LMCacheError):
    """The other side said what it may not say."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First frame of a connection.  Of other versions only ``version`` must be readable.

    Attributes:
        role: ``engine`` opens a session; ``worker`` joins the one named by ``session``, to hold
            its memory while the worker lives; ``control`` looks.
        token: what TCP asks for.
        layouts: of the session's chunks.
    """

    version: int
    role: Role = "control"
    session: Text = ""
    token: Text = ""
    pid: int = 0
    layouts: Annotated[tuple[LayoutSpec, ...], Meta(max_length=MAX_LAYOUTS)] = ()


class Prefetch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Open ``ticket``; answered by `Decided`, and by `Pending` before when that takes longer."""

    ticket: Number
    layout: Number
    keys: Keys
    parent: Key | None
    deadline_s: Seconds


class Release(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """End a ticket."""

    ticket: Number


class Run(msgspec.Struct, frozen=True, array_like=True):
    """`lmcache_core.cache.Wanted` chunks of one prefix: each is the parent of the next."""

    keys: Keys
    parent: Key | None
    layout: Number
    blank: bool


class Reserve(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Ask for slots, `MAX_WANTED` at most; answered by `Reserved` with the same ``seq``."""

    seq: Number
    runs: Annotated[tuple[Run, ...], Meta(max_length=MAX_WANTED)]


class Commit(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The slots at these offsets are written."""

    offsets: Offsets


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The slots at these offsets will not be written."""

    offsets: Offsets


class Touch(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """A prefix was used."""

    keys: Keys


class Forget(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Drop keys from the host tier."""

    keys: Keys


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Ask for the server's `Status`."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Answer to `Hello`; over a unix socket the arena's file comes with it.

    Attributes:
        incarnation: of the server's process; its memory is another in each.
        arena: pid, fd and size, for those who can look into the server.
        tiers: names of those below host, fastest first.
    """

    session: Text
    incarnation: Text
    arena: tuple[int, int, int]
    capacity_bytes: int
    tiers: tuple[str, ...]


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """The other answer to `Hello`: no session."""

    reason: Literal["version", "token", "session", "full", "layout", "closing"]
    message: str
    hint: str


class Pending(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """The ticket has been seen, and waits for tiers below host."""

    ticket: int


class Decided(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """The ticket is final.

    Attributes:
        offsets: of its chunks that are in host without a gap, pinned.
        sources: one byte a chunk: 0, or 1 + the index of the tier that it was fetched from;
            empty when none was.
        reason: why the chunk after these did not come.
    """

    ticket: int
    offsets: bytes
    sources: bytes
    reason: str


class Reserved(msgspec.Struct, frozen=True, array_like=True, tag=36):
    """An offset, or one of `NO_SLOT`, for each that was wanted."""

    seq: int
    answers: bytes


class SessionStatus(msgspec.Struct, frozen=True):
    """One session, as ``lmc node`` shows it."""

    pid: int
    connections: int
    slots: int
    tickets: int
    held_bytes: int


class TierStatus(msgspec.Struct, frozen=True):
    """One tier below host."""

    name: str
    used_bytes: int
    available: bool
    unavailable_reason: str


class Status(msgspec.Struct, frozen=True, array_like=True, tag=37):
    """What a node server does now."""

    version: str
    pid: int
    incarnation: str
    uptime_s: float
    host_used_bytes: int
    host_capacity_bytes: int
    host_chunks: int
    unsettled_writes: int
    tiers: tuple[TierStatus, ...]
    sessions: tuple[SessionStatus, ...]
    counters: dict[str, int]


FromClient = Hello | Prefetch | Release | Reserve | Commit | Abort | Touch | Forget | Ask
FromServer = Welcome | Refused | Pending | Decided | Reserved | Status

_Message = TypeVar("_Message")

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


def frame(message: FromClient | FromServer) -> bytes:
    """``message`` as it travels."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def read_client(body: bytes) -> FromClient:
    """What a client said.

    Raises:
        ProtocolError: no such message.
    """
    return _decode(_from_client, body)


def read_server(body: bytes) -> FromServer:
    """What a server said.

    Raises:
        ProtocolError: no such message.
    """
    return _decode(_from_server, body)


def _decode(decoder: msgspec.msgpack.Decoder[_Message], body: bytes) -> _Message:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a frame that is no message: {error}", op="node") from None


def split_keys(joined: bytes) -> list[bytes]:
    """The keys that were joined.

    Raises:
        ProtocolError: not a whole number of keys.
    """
    if len(joined) % STORED_KEY_BYTES:
        raise ProtocolError(f"{len(joined)} bytes are no whole number of keys", op="node")
    return [key for (key,) in struct.iter_unpack(f"{STORED_KEY_BYTES}s", joined)]


def pack_offsets(offsets: Iterable[int]) -> bytes:
    """Offsets as they travel between processes of one machine."""
    return array("Q", offsets).tobytes()


def unpack_offsets(packed: bytes) -> array[int]:
    """The offsets that were packed.

    Raises:
        ProtocolError: not a whole number of them.
    """
    if len(packed) % 8:
        raise ProtocolError(f"{len(packed)} bytes are no whole number of offsets", op="node")
    return array("Q", packed)


@functools.cache
def package_version() -> str:
    """Version of this package, "" when it runs uninstalled."""
    try:
        return metadata.version("lmcache-core")
    except metadata.PackageNotFoundError:
        return ""


class Frames:
    """Cuts what a socket gives into frames' bodies; holds one frame and what it was fed."""

    __slots__ = ("_buffer", "_max_bytes")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    @property
    def is_whole(self) -> bool:
        """Whether `take` gives something, or raises."""
        buffer, head = self._buffer, _LENGTH.size
        if len(buffer) < head:
            return False
        (nbytes,) = _LENGTH.unpack_from(buffer)
        return bool(nbytes > self._max_bytes or len(buffer) >= head + nbytes)

    def feed(self, data: bytes, limit: int = MAX_FRAME_BYTES) -> list[bytes]:
        """Take in ``data``, then `take`."""
        self._buffer += data
        return self.take(limit)

    def take(self, limit: int = MAX_FRAME_BYTES) -> list[bytes]:
        """The bodies that are whole now, at most ``limit``.

        Raises:
            ProtocolError: the first is over the limit of a frame.
        """
        buffer, head, start = self._buffer, _LENGTH.size, 0
        found: list[bytes] = []
        while len(buffer) - start >= head and len(found) < limit:
            (nbytes,) = _LENGTH.unpack_from(buffer, start)
            if nbytes > self._max_bytes:
                if not found:
                    raise ProtocolError(f"a frame of {nbytes} bytes", op="node")
                break
            end = start + head + nbytes
            if len(buffer) < end:
                break
            found.append(bytes(buffer[start + head : end]))
            start = end
        del buffer[:start]
        return found
