"""A proxy between a client and its store that misbehaves on demand.

Listens on loopback and forwards to a TCP address or a unix socket.  The knobs may be turned at
any time, from any thread.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

CHUNK_BYTES = 1 << 16
PIECE_S = 0.0005
"""Between the pieces of a reply, so that the receiver sees each alone."""


@dataclass(slots=True)
class Faults:
    """What the proxy does to every connection.

    Attributes:
        delay_s: before each forwarded piece, in each direction.
        bytes_per_s: bandwidth in each direction; 0 is unbounded.
        reply_piece_bytes: what the store answers arrives in pieces of so many bytes; 0 is as it
            comes.
        stalled: nothing is forwarded, connections stay open.
        mute: what the store answers is thrown away, connections stay open (half-open).
        refuse: new connections are closed at once.
        cut_after_bytes: hang up once the client has sent so many bytes in all; -1 is never.
        cut_reply_after_bytes: the same for bytes that the store has sent.
    """

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    reply_piece_bytes: int = 0
    stalled: bool = False
    mute: bool = False
    refuse: bool = False
    cut_after_bytes: int = -1
    cut_reply_after_bytes: int = -1


class FaultProxy:
    """Forwards until told otherwise; a context manager.

    Args:
        target: ``(host, port)`` or the path of a unix socket.

    Attributes:
        faults: the knobs.
        sent_bytes, reply_bytes: forwarded to the store and from it.
        turns: how often the direction changed to the store: round trips, while one client
            uses one connection.
    """

    def __init__(self, target: tuple[str, int] | Path) -> None:
        self._target = target
        self.faults = Faults()
        self.sent_bytes = self.reply_bytes = self.turns = 0
        self._lock = threading.Lock()
        self._last_from_store = True
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, name="proxy-accept", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self._listener.getsockname()[1])

    @property
    def connections(self) -> int:
        """Open now."""
        with self._lock:
            return len(self._pairs)

    def hang_up(self) -> None:
        """Close every connection now; new ones are accepted."""
        with self._lock:
            pairs = list(self._pairs)
        for client, store in pairs:
            _shut(client, store)

    def close(self) -> None:
        """Stop listening and hang up."""
        self._closed = True
        _shut(self._listener)
        self._listener.close()
        self.hang_up()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.faults.refuse:
                client.close()
                continue
            try:
                store = self._connect()
            except OSError:
                client.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (client, store)
            with self._lock:
                self._pairs.add(pair)
            for to_store in (True, False):
                threading.Thread(
                    target=self._forward, args=(pair, to_store), name="proxy", daemon=True
                ).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, Path):
            store = socket.socket(socket.AF_UNIX)
            store.connect(str(self._target))
            return store
        return socket.create_connection(self._target, timeout=None)

    def _forward(self, pair: tuple[socket.socket, socket.socket], to_store: bool) -> None:
        source, sink = pair if to_store else (pair[1], pair[0])
        try:
            while data := source.recv(CHUNK_BYTES):
                while self.faults.stalled and not self._closed:
                    time.sleep(0.005)
                if self.faults.delay_s:
                    time.sleep(self.faults.delay_s)
                if self.faults.bytes_per_s:
                    time.sleep(len(data) / self.faults.bytes_per_s)
                if self.faults.mute and not to_store:
                    continue
                allowed = self._allowed(len(data), to_store)
                step = 0 if to_store else self.faults.reply_piece_bytes
                for start in range(0, allowed, step or len(data)):
                    sink.sendall(data[start : min(allowed, start + (step or len(data)))])
                    time.sleep(PIECE_S if step else 0)
                if allowed < len(data):
                    break
        except OSError:
            pass
        _shut(*pair)
        with self._lock:
            if pair in self._pairs and not to_store:
                self._pairs.discard(pair)

    def _allowed(self, nbytes: int, to_store: bool) -> int:
        """How much of the next ``nbytes`` may pass; counts it."""
        with self._lock:
            limit = self.faults.cut_after_bytes if to_store else self.faults.cut_reply_after_bytes
            done = self.sent_bytes if to_store else self.reply_bytes
            allowed = nbytes if limit < 0 else max(0, min(nbytes, limit - done))
            if to_store:
                self.sent_bytes += allowed
                self.turns += self._last_from_store
            else:
                self.reply_bytes += allowed
            self._last_from_store = not to_store
            return allowed


def _shut(*sockets: socket.socket) -> None:
    for sock in sockets:
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected, or closed already
        sock.close()
