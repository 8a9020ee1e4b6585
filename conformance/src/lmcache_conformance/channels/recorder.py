"""A proxy for bytes between two channels: it records them, and changes one when told to.

For channels whose metadata is ``SCHEME://HOST:PORT`` of a TCP listener.
"""

from __future__ import annotations

import socket
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType
from urllib.parse import urlsplit

from lmcache_conformance.frame import Inconclusive

_OPENING = struct.Struct("<8sBB32s32s")
_MAGIC = b"LMCCHAN\x01"
_MAC_BYTES = 32


@dataclass(slots=True)
class Recording:
    """Of one connection: what the side that dialled sent, and what it was sent."""

    sent: bytearray = field(default_factory=bytearray)
    got: bytearray = field(default_factory=bytearray)


class Recorder:
    """Forwards to the listener that ``metadata`` names; a context manager.

    Attributes:
        metadata: of the proxy.
        recordings: one a connection, in order.
        flip: (whether of what the dialling side sends, index) of a byte to change in every
            connection from now on; None changes nothing.
    """

    def __init__(self, metadata: bytes) -> None:
        self._target = address_of(metadata)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.metadata = f"{urlsplit(metadata.decode()).scheme}://127.0.0.1:{port}".encode()
        self.recordings: list[Recording] = []
        self.flip: tuple[bool, int] | None = None
        self._socks: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def everything(self) -> bytes:
        """All bytes of both directions."""
        return b"|".join(bytes(each.sent) + b"|" + bytes(each.got) for each in self.recordings)

    def close(self) -> None:
        """End every connection, and wait for what carries them."""
        for sock in [self._listener, *self._socks]:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it ended by itself
        for thread in self._threads:
            thread.join(5)
        for sock in [self._listener, *self._socks]:
            sock.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            recording, flip = Recording(), self.flip
            self.recordings.append(recording)
            self._socks |= {near, far}
            for source, sink, store, ours in (
                (near, far, recording.sent, True),
                (far, near, recording.got, False),
            ):
                at = flip[1] if flip is not None and flip[0] is ours else -1
                thread = threading.Thread(
                    target=_forward, args=(source, sink, store, at), daemon=True
                )
                self._threads.append(thread)
                thread.start()


def _forward(source: socket.socket, sink: socket.socket, store: bytearray, flip: int) -> None:
    try:
        while data := bytearray(source.recv(1 << 16)):
            if len(store) <= flip < len(store) + len(data):
                data[flip - len(store)] ^= 0x10
            store += data
            sink.sendall(data)
    except OSError:
        pass  # one of the two has hung up
    for sock in (source, sink):
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # so has the other


def address_of(metadata: bytes) -> tuple[str, int]:
    """Host and port that it names.

    Raises:
        Inconclusive: it names none, so nothing can be put between.
    """
    try:
        parts = urlsplit(metadata.decode("ascii"))
        if parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass  # said below
    raise Inconclusive("its metadata is no SCHEME://HOST:PORT, so there can be no proxy before it")


@dataclass(frozen=True, slots=True)
class Shaken:
    """A handshake of `lmcache_core.sdk.handshake`, as it was recorded.

    Attributes:
        version: of the channel's wire protocol.
        sent, got: its bytes in each direction, without what came after.
    """

    version: tuple[int, int]
    sent: bytes
    got: bytes


def shaken(recording: Recording) -> Shaken:
    """
    Raises:
        Inconclusive: the channel uses another handshake.
    """
    sent, got = bytes(recording.sent), bytes(recording.got)
    if not got.startswith(_MAGIC) or len(got) < _OPENING.size:
        raise Inconclusive("its handshake is not that of lmcache_core.sdk, so none can be crafted")
    _, major, minor, _, _ = _OPENING.unpack_from(got)
    hello = _length(sent, _OPENING.size)
    ours = _OPENING.size + 2 + hello + _MAC_BYTES
    theirs = _OPENING.size + 1 + 2 + _length(got, _OPENING.size + 1) + _MAC_BYTES
    return Shaken((major, minor), sent[:ours], got[:theirs])


def _length(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")
