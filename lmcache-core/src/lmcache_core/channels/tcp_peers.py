"""Who is connected to a ``tcp://`` channel: a link each, and lanes as they are needed."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lmcache_core.channels.tcp_lane import Answering, Asking
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    ChannelCapabilities,
    ChannelHost,
    Endpoint,
    Grants,
    Introduction,
    Link,
    Listener,
    PeerRefused,
    Status,
    dial,
)

SCHEME = "tcp"
WIRE_VERSION = (1, 0)
SESSION_BYTES = 16
_LINK, _THEIR_LANE, _OUR_LANE = b"link", b"ask:", b"ans:"
"""How a connection starts its hello: a link, a lane on which the dialling side asks, or answers."""
_NOTIFY, _WANT_LANE = 1, 2


@dataclass(slots=True)
class Peer:
    """One connected peer; ``dialled`` is where it listens, when we reached it."""

    name: str
    link: Link
    session: bytes
    dialled: Endpoint | None
    asking: Asking
    answering: list[Answering] = field(default_factory=list)
    lanes: list[socket.socket] = field(default_factory=list)
    lane_came: threading.Condition = field(default_factory=threading.Condition)
    telling: threading.RLock = field(default_factory=threading.RLock)
    gone: bool = False


class Peers:
    """Thread-safe.

    Args:
        grants: what lanes of peers may touch.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        host: ChannelHost,
        grants: Grants,
        capabilities: ChannelCapabilities,
    ) -> None:
        self._host = host
        self._grants = grants
        self._capabilities = capabilities
        self._lock = threading.Lock()
        self._closed = False
        self._peers: dict[str, Peer] = {}
        self._sessions: dict[bytes, Peer] = {}
        self._names = itertools.count(1)
        self._threads: set[threading.Thread] = set()
        self._listener = Listener(
            endpoint,
            secret=host.secret,
            introduce=lambda: self._introduction(b"" if self._full() else _new_session()),
            accepted=self._accepted,
            refused=lambda why: host.counter(f"refused.{why}").inc(),
        )

    @property
    def endpoint(self) -> Endpoint:
        """Where we listen."""
        return self._listener.endpoint

    def get(self, name: str) -> Peer | None:
        """The peer, unless it is gone."""
        return self._peers.get(name)

    def connect(self, endpoint: Endpoint, deadline_s: float) -> Peer:
        """A new peer; see `TransferChannel.connect`."""
        if self._full():
            raise _too_many()
        sock, session = dial(
            endpoint, self._host.secret, self._introduction(_LINK), deadline_s=deadline_s
        )
        if len(session) != SESSION_BYTES:
            sock.close()
            raise _too_many()
        return self._join(sock, session, endpoint)

    def notify(self, peer: Peer, message: bytes) -> Status:
        """Send a notification."""
        return peer.link.send(_NOTIFY, message)

    def close(self) -> None:
        """End every connection, and wait for their threads."""
        with self._lock:
            self._closed = True
        until_s = time.monotonic() + CLOSE_LIMIT_S - 1
        self._listener.close()
        for peer in list(self._peers.values()):
            self.part(peer)
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))

    def _full(self) -> bool:
        return len(self._peers) >= self._capabilities.max_peers

    def _introduction(self, hello: bytes) -> Introduction:
        return Introduction(SCHEME, WIRE_VERSION, hello)

    def _accepted(self, sock: socket.socket, hello: bytes, ours: Introduction) -> None:
        kind, session = hello[:4], hello[4:]
        if kind == _LINK:
            if self._closed or not ours.hello:
                sock.close()
                return
            try:
                self._join(sock, ours.hello, None)
            except (BackendClosed, BackendUnavailable):
                self._host.counter("refused.handshake").inc()
            return
        peer = self._sessions.get(session)
        if peer is None:
            sock.close()
        elif kind == _THEIR_LANE:
            self._answer(peer, sock)
        else:
            with peer.lane_came:
                peer.lanes.append(sock)
                peer.lane_came.notify()

    def _join(self, sock: socket.socket, session: bytes, dialled: Endpoint | None) -> Peer:
        try:
            host, port = sock.getpeername()[:2]
        except OSError as error:
            sock.close()
            raise BackendUnavailable(
                "the peer left during the handshake", backend=SCHEME, op="connect"
            ) from error
        name = f"{host}:{port}#{next(self._names)}"
        asking = Asking(
            f"tcp-ask-{port}",
            lambda deadline_s: self._lane(peer, deadline_s),
            self._capabilities.max_transfers,
        )
        peer = Peer(name, Link(name, b"", sock), session, dialled, asking)
        with self._lock:
            self._peers[name] = peer
            self._sessions[session] = peer
            closed = self._closed
        self.spawn(lambda: self.part(peer, peer.link.run(self._framed)), "tcp-link")
        if closed:
            self.part(peer)
            raise BackendClosed("the channel was closed", backend=SCHEME, op="connect")
        return peer

    def _lane(self, peer: Peer, deadline_s: float) -> socket.socket:
        """A lane on which we ask; dialled by whichever side dialled the link."""
        if peer.dialled is not None:
            return self._dial_lane(peer, _THEIR_LANE, deadline_s)
        peer.link.send(_WANT_LANE, b"")
        with peer.lane_came:
            came = peer.lane_came.wait_for(
                lambda: peer.lanes or peer.gone, max(0.0, deadline_s - time.monotonic())
            )
            if not came or not peer.lanes:
                raise BackendUnavailable(f"{peer.name} opened no lane", backend=SCHEME, op="lane")
            return peer.lanes.pop()

    def _dial_lane(self, peer: Peer, kind: bytes, deadline_s: float) -> socket.socket:
        assert peer.dialled is not None
        ours = self._introduction(kind + peer.session)
        sock, _ = dial(peer.dialled, self._host.secret, ours, deadline_s=deadline_s)
        return sock

    def _answer(self, peer: Peer, sock: socket.socket) -> None:
        """Serve the peer's transfers on ``sock``, on this thread, until the lane ends."""
        answering = Answering(
            peer.name,
            sock,
            self._grants,
            notify=lambda message: self._notified(peer, message),
            max_pieces=self._capabilities.max_pieces,
            max_message_bytes=self._capabilities.max_message_bytes,
        )
        with self._lock:
            gone = peer.gone
            peer.answering.append(answering)
        if gone:
            answering.close()
        with self._counted():
            answering.run()
        with self._lock:
            peer.answering.remove(answering)

    def _framed(self, link: Link, kind: int, payload: bytes) -> None:
        peer = self._peers.get(link.peer)
        if peer is None:
            return
        if kind == _NOTIFY:
            self._notified(peer, payload)
        elif kind == _WANT_LANE and peer.dialled is not None:
            self.spawn(lambda: self._offer_lane(peer), "tcp-answer")

    def _offer_lane(self, peer: Peer) -> None:
        try:
            sock = self._dial_lane(peer, _OUR_LANE, time.monotonic() + CLOSE_LIMIT_S)
        except (BackendUnavailable, PeerRefused):
            self._host.counter("lane_failed").inc()
            return
        self._answer(peer, sock)

    def _notified(self, peer: Peer, message: bytes) -> None:
        with peer.telling:
            if not peer.gone:
                self._host.notified(peer.name, message)

    def part(self, peer: Peer, why: str = "") -> None:
        """End everything of ``peer``; core is told when ``why`` is given.  Once."""
        with peer.telling, self._lock:
            if peer.gone:
                return
            peer.gone = True
            self._peers.pop(peer.name, None)
            self._sessions.pop(peer.session, None)
            answering = list(peer.answering)
        with peer.lane_came:
            peer.lane_came.notify_all()
            for sock in peer.lanes:
                sock.close()
        peer.link.close()
        peer.asking.close()
        for one in answering:
            one.close()
        if why:
            self._host.lost(peer.name, why)

    def spawn(self, work: Callable[[], None], name: str) -> None:
        """Run ``work`` on a thread that `close` waits for."""

        def run() -> None:
            with self._counted():
                work()

        threading.Thread(target=run, name=name, daemon=True).start()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Let `close` wait for this thread."""
        thread = threading.current_thread()
        self._threads.add(thread)
        try:
            yield
        finally:
            self._threads.discard(thread)


def _new_session() -> bytes:
    return secrets.token_bytes(SESSION_BYTES)


def _too_many() -> PeerRefused:
    return PeerRefused(
        "full", "no more peers are wanted", backend=SCHEME, hint="raise max_peers in the URL"
    )
