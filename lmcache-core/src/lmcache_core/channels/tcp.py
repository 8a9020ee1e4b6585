"""``tcp://HOST:PORT``: the reference channel, over blocking sockets.

A connection to a peer is one link for notifications and, as they are needed, one lane for the
transfers of either side.  The side that dials opens all of them, so only one must be reachable.
Bytes are sent from and received into the memory they belong to.  They are not encrypted: use it
inside a network that you trust, or through a tunnel.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lmcache_core.channels.tcp_lane import Answering, Asking, Transfer
from lmcache_core.channels.tcp_wire import NO_SPAN, READ, WRITE, Request, number_of, ticket_of
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    Access,
    BackendClosed,
    BackendUnavailable,
    Buffer,
    ChannelCapabilities,
    ChannelHost,
    ChannelPlugin,
    ConfigError,
    ContractViolation,
    Endpoint,
    Grant,
    Grants,
    Introduction,
    Link,
    Listener,
    MemoryKind,
    OpContext,
    OptionSpec,
    OptionValue,
    Part,
    PeerRefused,
    Piece,
    Region,
    Status,
    TransferChannel,
    check_ranges,
    dial,
)

SCHEME = "tcp"
WIRE_VERSION = (1, 0)
SESSION_BYTES = 16
_LINK, _THEIR_LANE, _OUR_LANE = b"link", b"ask:", b"ans:"
"""How a connection starts its hello: a link, a lane on which the dialling side asks, or answers."""
_NOTIFY, _WANT_LANE = 1, 2


@dataclass(slots=True)
class _Peer:
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


class TcpChannel(TransferChannel):
    """See `TransferChannel`.

    Args:
        endpoint: where to listen.
        max_peers: at the same time.
    """

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        self.capabilities = ChannelCapabilities(
            memory=frozenset({MemoryKind.HOST, MemoryKind.PINNED}),
            ordered=True,
            can_revoke=True,
            guarded=True,
            max_peers=max_peers,
        )
        self._host = host
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._regions: dict[int, Region] = {}
        self._grants = Grants(host.clock)
        self._peers: dict[str, _Peer] = {}
        self._sessions: dict[bytes, _Peer] = {}
        self._transfers: dict[int, Transfer] = {}
        self._numbers = itertools.count(1)
        self._names = itertools.count(1)
        self._threads: set[threading.Thread] = set()
        self._listener = Listener(
            endpoint,
            secret=host.secret,
            introduce=lambda: self._introduction(b"" if self._full() else _new_session()),
            accepted=self._accepted,
            full=lambda: False,
            refused=lambda why: host.counter(f"refused.{why}").inc(),
        )

    def register(self, region: Region) -> None:
        self._check_open("register")
        self._regions[region.region_id] = region

    def unregister(self, region: Region) -> None:
        self._check_open("unregister")
        self._regions.pop(region.region_id, None)

    def metadata(self) -> bytes:
        self._check_open("metadata")
        return str(self._listener.endpoint).encode()

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        self._check_open("connect")
        try:
            endpoint = Endpoint.parse(metadata.decode("ascii"), SCHEME)
        except UnicodeDecodeError:
            endpoint = Endpoint(SCHEME, "", 0)
        if not endpoint.port:
            raise ConfigError(
                f"{metadata[:64]!r} is no address of a peer", backend=SCHEME, op="connect",
                hint=f"write {SCHEME}://HOST:PORT",
            )  # fmt: skip
        if self._full():
            raise _too_many()
        until_s = time.monotonic() + max(0.0, ctx.deadline_s - self._host.clock())
        sock, session = dial(
            endpoint, self._host.secret, self._introduction(_LINK), deadline_s=until_s
        )
        if len(session) != SESSION_BYTES:
            sock.close()
            raise _too_many()
        return self._join(sock, session, endpoint).name

    def disconnect(self, peer: str) -> None:
        self._check_open("disconnect")
        found = self._peers.get(peer)
        if found is not None:
            self._part(found, "")

    def notify(self, peer: str, message: bytes) -> Status:
        self._check_open("notify")
        found = self._peers.get(peer)
        if len(message) > self.capabilities.max_message_bytes:
            return Status.REJECTED
        return Status.FAILED if found is None else found.link.send(_NOTIFY, message)

    def grant(self, peer: str, spans: Sequence[Buffer], *, access: Access, lease_s: float) -> Grant:
        self._check_open("grant")
        self._check_buffers(spans, "grant")
        if peer not in self._peers:
            raise BackendUnavailable(f"{peer} is gone", backend=SCHEME, op="grant")
        number = self._grants.add(peer, spans, access, lease_s)
        return Grant(number, ticket_of(number))

    def revoke(self, grant: Grant, ctx: OpContext) -> Status:
        self._check_open("revoke")
        # Whoever touches a span looks every few milliseconds whether it still may.
        left_s = max(ctx.deadline_s - self._host.clock(), 0.0)
        if self._grants.revoke(grant.number, left_s):
            return Status.OK
        spans = self._grants.spans(grant.number)
        self._spawn(partial(self._release_late, grant.number, spans), "tcp-revoke")
        return Status.ABANDONED

    def write(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        return self._start(WRITE, peer, grant, pieces, ctx, notification)

    def read(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        return self._start(READ, peer, grant, pieces, ctx, notification)

    def poll(self, transfer: int) -> list[Status] | None:
        self._check_open("poll")
        found = self._transfers.get(transfer)
        if found is None:
            raise ContractViolation(f"no transfer {transfer}", backend=SCHEME, op="poll")
        if found.answers is not None:
            self._transfers.pop(transfer, None)
        return found.answers

    def wait(self, transfer: int, timeout_s: float) -> list[Status] | None:
        found = self._transfers.get(transfer)
        if found is not None:
            found.ended.wait(timeout_s)
        return self.poll(transfer)

    def cancel(self, transfer: int) -> None:
        self._check_open("cancel")
        found = self._transfers.get(transfer)
        if found is not None and found.asking is not None:
            found.asking.cancel(found)

    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        self._check_open("quiesce")
        found = self._peers.get(peer)
        running = found.asking.cancel_all() if found is not None else []
        quiet = all(
            transfer.ended.wait(max(0.0, ctx.deadline_s - self._host.clock()))
            for transfer in running
        )
        answers = {self.revoke(Grant(number, b""), ctx) for number in self._grants.of(peer)}
        return Status.OK if quiet and answers <= {Status.OK} else Status.ABANDONED

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._pid:
            return
        until_s = time.monotonic() + CLOSE_LIMIT_S - 1
        self._listener.close()
        for peer in list(self._peers.values()):
            self._part(peer, "")
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))

    def _start(
        self,
        op: int,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        notification: bytes,
    ) -> int:
        name = "write" if op == WRITE else "read"
        self._check_open(name)
        self._check_buffers([piece.local for piece in pieces], name)
        if len(notification) > self.capabilities.max_message_bytes:
            raise ContractViolation(
                f"a notification of {len(notification)} bytes", backend=SCHEME, op=name
            )
        number = number_of(grant)
        parts = [_part(piece) for piece in pieces]
        views = [p.local.view for p in pieces if p.local.view is not None]
        until_s = time.monotonic() + max(0.0, ctx.deadline_s - self._host.clock())
        transfer = Transfer(Request(op, number or 0, parts, notification), views, until_s)
        ticket = next(self._numbers)
        self._transfers[ticket] = transfer
        found = self._peers.get(peer)
        if found is None:
            transfer.end(Status.FAILED)
        elif number is None:
            transfer.end(Status.REJECTED)
        else:
            transfer.asking = found.asking
            found.asking.start(transfer)
        return ticket

    def _check_buffers(self, buffers: Sequence[Buffer], op: str) -> None:
        if len(buffers) > self.capabilities.max_pieces:
            raise ContractViolation(
                f"{len(buffers)} pieces, max_pieces is {self.capabilities.max_pieces}",
                backend=SCHEME,
                op=op,
            )
        regions = list(self._regions.values())
        for one in buffers:
            inside = any(
                r.address <= one.address and one.address + one.nbytes <= r.address + r.nbytes
                for r in regions
            )
            if not inside or one.view is None:
                raise ContractViolation(
                    "a buffer outside of every registered region", backend=SCHEME, op=op
                )
        if op == "read":
            ordered = sorted((one.address, one.nbytes) for one in buffers)
            for (address, nbytes), (after, _) in itertools.pairwise(ordered):
                if address + nbytes > after:
                    raise ContractViolation("targets overlap", backend=SCHEME, op=op)

    def _check_open(self, op: str) -> None:
        if self._closed or os.getpid() != self._pid:
            why = "closed" if self._closed else "opened in another process"
            raise BackendClosed(
                f"the channel was {why}", backend=SCHEME, op=op, hint="open it again"
            )

    def _full(self) -> bool:
        return len(self._peers) >= self.capabilities.max_peers

    def _introduction(self, hello: bytes) -> Introduction:
        return Introduction(SCHEME, WIRE_VERSION, hello)

    def _accepted(self, sock: socket.socket, hello: bytes, ours: Introduction) -> None:
        kind, session = hello[:4], hello[4:]
        if kind == _LINK:
            if self._closed or not ours.hello:
                sock.close()
                return
            self._join(sock, ours.hello, None)
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

    def _join(self, sock: socket.socket, session: bytes, dialled: Endpoint | None) -> _Peer:
        host, port = sock.getpeername()[:2]
        name = f"{host}:{port}#{next(self._names)}"
        asking = Asking(
            f"tcp-ask-{port}",
            lambda deadline_s: self._lane(peer, deadline_s),
            self.capabilities.max_transfers,
        )
        peer = _Peer(name, Link(name, b"", sock), session, dialled, asking)
        with self._lock:
            self._peers[name] = peer
            self._sessions[session] = peer
            closed = self._closed
        self._spawn(lambda: self._link_ended(peer, peer.link.run(self._framed)), "tcp-link")
        if closed:
            self._part(peer, "")
            raise BackendClosed("the channel was closed", backend=SCHEME, op="connect")
        return peer

    def _lane(self, peer: _Peer, deadline_s: float) -> socket.socket:
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

    def _dial_lane(self, peer: _Peer, kind: bytes, deadline_s: float) -> socket.socket:
        assert peer.dialled is not None
        ours = self._introduction(kind + peer.session)
        sock, _ = dial(peer.dialled, self._host.secret, ours, deadline_s=deadline_s)
        return sock

    def _answer(self, peer: _Peer, sock: socket.socket) -> None:
        """Serve the peer's transfers on ``sock``, on this thread, until the lane ends."""
        answering = Answering(
            peer.name,
            sock,
            self._grants,
            notify=lambda message: self._notified(peer, message),
            max_pieces=self.capabilities.max_pieces,
            max_message_bytes=self.capabilities.max_message_bytes,
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
            self._spawn(lambda: self._offer_lane(peer), "tcp-answer")

    def _offer_lane(self, peer: _Peer) -> None:
        try:
            sock = self._dial_lane(peer, _OUR_LANE, time.monotonic() + CLOSE_LIMIT_S)
        except (BackendUnavailable, PeerRefused):
            self._host.counter("lane_failed").inc()
            return
        self._answer(peer, sock)

    def _notified(self, peer: _Peer, message: bytes) -> None:
        with peer.telling:
            if not peer.gone:
                self._host.notified(peer.name, message)

    def _link_ended(self, peer: _Peer, why: str) -> None:
        self._part(peer, why)

    def _part(self, peer: _Peer, why: str) -> None:
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

    def _release_late(self, number: int, spans: Sequence[Buffer]) -> None:
        while not self._grants.revoke(number, 1.0):
            pass
        for span in spans:
            self._host.released(span.token)

    def _spawn(self, work: Callable[[], None], name: str) -> None:
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


def _part(piece: Piece) -> Part:
    """``piece`` as it is named to the peer; what no grant can hold is named as no span."""
    nameable = 0 <= piece.span < NO_SPAN and 0 <= piece.offset < 1 << 63
    span, offset = (piece.span, piece.offset) if nameable else (NO_SPAN, 0)
    return Part(span, offset, piece.local.nbytes)


def _new_session() -> bytes:
    return secrets.token_bytes(SESSION_BYTES)


def _too_many() -> PeerRefused:
    return PeerRefused(
        "full", "no more peers are wanted", backend=SCHEME, hint="raise max_peers in the URL"
    )


def _open(url: str, options: Mapping[str, OptionValue], host: ChannelHost) -> TransferChannel:
    check_ranges(options, {"max_peers": (1, 4096)}, backend=SCHEME)
    return TcpChannel(Endpoint.parse(url, SCHEME), host, max_peers=int(options["max_peers"]))


plugin = ChannelPlugin(
    scheme=SCHEME,
    open=_open,
    options=(OptionSpec(name="max_peers", type=int, default=64, help="peers at the same time"),),
)
