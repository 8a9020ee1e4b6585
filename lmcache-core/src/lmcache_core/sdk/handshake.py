"""How two processes prove to each other that they know the same token, without sending it.

Both send an opening with a fresh nonce; then each sends a MAC, by HMAC-SHA-256 under the token,
over both openings and what it says of itself.  The labels of the two sides differ, so an answer
can't be sent back as a question, and a recorded one is worth nothing against another nonce.  The
pattern is that of mutual challenge-response in ISO/IEC 9798-4.  What follows on the connection is
neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from dataclasses import dataclass

from lmcache_core.sdk.channel import PeerRefused
from lmcache_core.sdk.errors import BackendUnavailable

MAX_HELLO_BYTES = 4096
MAX_SCHEME_BYTES = 32

_MAGIC = b"LMCCHAN\x01"
_OPENING = struct.Struct("<8sBB32s32s")  # magic, major, minor, scheme, nonce
_LENGTH = struct.Struct("<H")
_MAC_BYTES = 32
_ACCEPTED, _BAD_TOKEN, _BAD_VERSION, _BAD_SCHEME, _FULL = range(5)
_REFUSALS = {_BAD_TOKEN: "token", _BAD_VERSION: "version", _BAD_SCHEME: "scheme", _FULL: "full"}
_HINTS = {
    "token": "give both sides the same token file",
    "version": "install the same release on both sides",
    "scheme": "both sides must name the same kind of channel",
    "full": "raise max_peers there, or connect later",
}


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a side is and says of itself.

    Attributes:
        scheme: of the channel; ASCII, up to 32 bytes.
        version: of the channel's wire protocol, (major, minor); majors must be equal.
        hello: up to 4 KiB; read by the other side only once it is authentic.
    """

    scheme: str
    version: tuple[int, int]
    hello: bytes = b""


def answer(
    sock: socket.socket,
    secret: bytes,
    ours: Introduction,
    *,
    deadline_s: float,
    full: bool = False,
) -> bytes:
    """The accepting side; returns the peer's hello.  ``full`` refuses after the openings.

    Raises:
        PeerRefused: by us; the peer was told the reason.
        BackendUnavailable: it went away, was too slow, or sent something else.
    """
    wire = _Wire(sock, deadline_s, ours.scheme)
    opening = _opening(ours)
    wire.send(opening)
    theirs = wire.receive(_OPENING.size)
    refusal = _FULL if full else _judge(theirs, ours)
    if refusal:
        wire.send(bytes([refusal]))
        raise _refused(refusal, ours.scheme)
    hello = wire.receive(_length(wire.receive(_LENGTH.size), ours.scheme))
    proof = wire.receive(_MAC_BYTES)
    expected = _mac(secret, b"client", opening, theirs, hello)
    if not hmac.compare_digest(proof, expected):
        wire.send(bytes([_BAD_TOKEN]))
        raise _refused(_BAD_TOKEN, ours.scheme)
    mac = _mac(secret, b"server", opening, theirs, proof + ours.hello)
    wire.send(bytes([_ACCEPTED]) + _LENGTH.pack(len(ours.hello)) + ours.hello + mac)
    return hello


def ask(sock: socket.socket, secret: bytes, ours: Introduction, *, deadline_s: float) -> bytes:
    """The connecting side; returns the peer's hello.

    Raises:
        PeerRefused: by either side.
        BackendUnavailable: it went away, was too slow, or sent something else.
    """
    wire = _Wire(sock, deadline_s, ours.scheme)
    theirs = wire.receive(_OPENING.size)
    opening = _opening(ours)
    refusal = _judge(theirs, ours)
    wire.send(opening)
    if refusal:
        raise _refused(refusal, ours.scheme)
    proof = _mac(secret, b"client", theirs, opening, ours.hello)
    wire.send(_LENGTH.pack(len(ours.hello)) + ours.hello + proof)
    status = wire.receive(1)[0]
    if status != _ACCEPTED:
        raise _refused(status, ours.scheme)
    hello = wire.receive(_length(wire.receive(_LENGTH.size), ours.scheme))
    mac = wire.receive(_MAC_BYTES)
    if not hmac.compare_digest(mac, _mac(secret, b"server", theirs, opening, proof + hello)):
        raise _refused(_BAD_TOKEN, ours.scheme)
    return hello


def _opening(ours: Introduction) -> bytes:
    nonce = secrets.token_bytes(32)
    return _OPENING.pack(_MAGIC, *ours.version, ours.scheme.encode("ascii"), nonce)


def _judge(opening: bytes, ours: Introduction) -> int:
    magic, major, _, scheme, _ = _OPENING.unpack(opening)
    if magic != _MAGIC:
        raise BackendUnavailable(
            "what is at the other end speaks another protocol", backend=ours.scheme, op="connect"
        )
    if major != ours.version[0]:
        return _BAD_VERSION
    return 0 if scheme.rstrip(b"\0") == ours.scheme.encode("ascii") else _BAD_SCHEME


def _length(packed: bytes, scheme: str) -> int:
    length: int = _LENGTH.unpack(packed)[0]
    if length > MAX_HELLO_BYTES:
        raise BackendUnavailable(f"a hello of {length} bytes", backend=scheme, op="connect")
    return length


def _mac(secret: bytes, side: bytes, server: bytes, client: bytes, rest: bytes) -> bytes:
    return hmac.new(secret, side + server + client + rest, hashlib.sha256).digest()


def _refused(code: int, scheme: str) -> PeerRefused:
    reason = _REFUSALS.get(code, "version")
    return PeerRefused(
        reason, f"the two sides do not agree: {reason}", backend=scheme, hint=_HINTS[reason]
    )


class _Wire:
    """Whole messages, before one deadline."""

    def __init__(self, sock: socket.socket, deadline_s: float, scheme: str) -> None:
        self._sock = sock
        self._deadline_s = deadline_s
        self._scheme = scheme

    def send(self, data: bytes) -> None:
        try:
            self._arm()
            self._sock.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def receive(self, nbytes: int) -> bytes:
        data = bytearray()
        try:
            while len(data) < nbytes:
                self._arm()
                part = self._sock.recv(nbytes - len(data))
                if not part:
                    raise ConnectionError("it closed the connection")
                data += part
        except OSError as error:
            raise self._gone(error) from error
        return bytes(data)

    def _arm(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left_s)

    def _gone(self, error: OSError) -> BackendUnavailable:
        return BackendUnavailable(
            f"no handshake: {error or type(error).__name__}", backend=self._scheme, op="connect"
        )
