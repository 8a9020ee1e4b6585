"""One connection of a node server: bounded buffers, never blocking, and its end.

The other side may still copy to and from the memory that its session holds.  So once a session
is open the server never ends a connection: it shuts its own half, and waits for the other's.
"""

from __future__ import annotations

import socket
import time

from lmcache_core.node.protocol import Frames, FromServer, frame
from lmcache_core.node.session import Session

MAX_UNSENT_BYTES = 8 << 20
"""Answers that wait for a client to read; more, and it is muted."""
READ_BYTES = 256 << 10
FRAMES_AT_ONCE = 64
"""Handled before the others get their turn."""


class Connection:
    """Owner thread only.

    Attributes:
        session: what it belongs to, once it has one.
        role: as greeted; "" before.
        blocked: the server waits for room to send.
        muted: our half is shut: nothing more is said.
        deaf: it broke the protocol: what it says is thrown away.
        since_s: when it came.
    """

    __slots__ = (
        "_frames",
        "_unsent",
        "blocked",
        "deaf",
        "muted",
        "role",
        "session",
        "since_s",
        "sock",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.session: Session | None = None
        self.role = ""
        self.blocked = False
        self.muted = False
        self.deaf = False
        self.since_s = time.monotonic()
        self._frames = Frames()
        self._unsent = bytearray()

    @property
    def unsent(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._unsent)

    @property
    def has_more(self) -> bool:
        """Whether `read` has something without the socket."""
        return not self.deaf and self._frames.is_whole

    def read(self) -> list[bytes] | None:
        """The next frames, at most `FRAMES_AT_ONCE`; None at the end of the stream.

        Raises:
            ProtocolError: a frame over the limit.
        """
        if self.has_more:
            return self._frames.take(FRAMES_AT_ONCE)
        try:
            data = self.sock.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            # Reset: the other side is closed, only less politely.
            return None
        if not data:
            return None
        return [] if self.deaf else self._frames.feed(data, FRAMES_AT_ONCE)

    def say(self, message: FromServer) -> bool:
        """Queue ``message``; False when that was too much, and the connection is muted."""
        if self.muted:
            return True
        self._unsent += frame(message)
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self.mute()
            return False
        return True

    def hand_over(self, message: FromServer, fd: int) -> None:
        """Say ``message`` at once, with a file; for the first thing that is said."""
        data = frame(message)
        try:
            sent = socket.send_fds(self.sock, [data], [fd])
        except OSError:
            # Its end is about to be read.
            self.mute()
            return
        self._unsent += data[sent:]

    def flush(self) -> None:
        """Send what the other side takes now."""
        while self._unsent:
            try:
                sent = self.sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.mute()
                return
            del self._unsent[:sent]

    def mute(self) -> None:
        """Shut our half."""
        self.muted = True
        self._unsent.clear()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            # The other side is gone; its end is about to be read.
            pass
