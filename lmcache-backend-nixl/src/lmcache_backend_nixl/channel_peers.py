"""The peers of a ``nixl+ucx://`` channel: how they come, what they say, and how they go."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable

from lmcache_backend_nixl.channel_plugin import SCHEME
from lmcache_backend_nixl.channel_wire import (
    BYE,
    HAVE,
    META,
    NONCE_BYTES,
    NOTIFY,
    POKE,
    QUIET,
    READY,
    REVOKE,
    REVOKED,
    Identity,
    Malformed,
    Meta,
    pack_have,
    pack_meta,
    read_have,
    read_meta,
    read_number,
    read_revoke,
)
from lmcache_backend_nixl.granting import Granting
from lmcache_backend_nixl.transfers import Peer, Transfers
from lmcache_backend_nixl.ucx import State, UcxAgent
from lmcache_core.sdk import (
    BackendUnavailable,
    ChannelHost,
    ConfigError,
    Endpoint,
    Introduction,
    Link,
    Listener,
    OpContext,
    PeerRefused,
    Status,
    dial,
)

WIRE_VERSION = (1, 0)
GREETING_S = 5.0
"""From an authentic connection to a path that stands."""
LINGER_S = 2.0
"""From BYE to the end of the link, when the other side does not say QUIET."""
_SLICE_S = 0.05


class Peers:
    """Thread-safe; callbacks of the host about one peer come from its link's thread.

    Args:
        max_peers: connected or connecting at the same time.

    Raises:
        ConfigError: the URL is wrong.
        BackendUnavailable: the address can't be listened at.
    """

    def __init__(
        self,
        url: str,
        host: ChannelHost,
        agent: UcxAgent,
        transfers: Transfers,
        granting: Granting,
        identity: Identity,
        max_peers: int,
    ) -> None:
        self._host = host
        self._agent = agent
        self._transfers = transfers
        self._granting = granting
        self._identity = identity
        self._max_peers = max_peers
        self.sequence = 0
        self._by_name: dict[str, Peer] = {}
        self._leaving: dict[Peer, float] = {}
        self._kept: dict[str, None] = {}
        self._broken: list[Peer] = []
        self._numbers = itertools.count(1)
        self._changed = threading.Condition(agent.lock)
        self._open = True
        self._takes: dict[int, Callable[[Peer, bytes], None]] = {
            META: self._on_meta, HAVE: self._on_have, READY: self._on_ready, POKE: self._on_poke,
            NOTIFY: self._on_notify, REVOKE: self._on_revoke, REVOKED: self._on_revoked,
            BYE: self._on_bye, QUIET: self._on_quiet,
        }  # fmt: skip
        self._listener = Listener(
            Endpoint.parse(url, SCHEME),
            secret=host.secret,
            introduce=self._introduce,
            accepted=self._accepted,
            full=self._full,
            refused=lambda why: host.logger.warning("a connection was not accepted: %s", why),
        )
        self.endpoint = self._listener.endpoint

    @staticmethod
    def check_url(url: str) -> None:
        """Raises ConfigError when it is no address."""
        Endpoint.parse(url, SCHEME)

    def find(self, name: str) -> Peer | None:
        """A peer that is connected."""
        # One read of a dict needs no lock, and every transfer comes by here.
        peer = self._by_name.get(name)
        return peer if peer is not None and peer.ready and not peer.gone else None

    def announce(self) -> None:
        """Tell every peer of what is registered now."""
        with self._changed:
            self.sequence += 1
            for peer in self._by_name.values():
                self._send_meta(peer)

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        """See `TransferChannel.connect`."""
        try:
            endpoint = Endpoint.parse(metadata.decode("ascii"), SCHEME)
        except UnicodeDecodeError as error:
            raise ConfigError("this is no address", backend=SCHEME, op="connect") from error
        if not endpoint.port:
            raise ConfigError("the address has no port", backend=SCHEME, op="connect")
        if self._full():
            raise PeerRefused("full", "this side has max_peers", backend=SCHEME)
        # The host's clock may be another than the one that sockets wait by.
        until_s = time.monotonic() + ctx.remaining_s(self._host.clock())
        sock, hello = dial(endpoint, self._host.secret, self._introduce(), deadline_s=until_s)
        peer = self._made(sock, hello)
        if peer is None:
            raise BackendUnavailable(
                "what answers is no other channel, or this one is full", backend=SCHEME,
                op="connect",
            )  # fmt: skip
        threading.Thread(
            target=self._carry, args=(peer,), name="nixl-ucx-link", daemon=True
        ).start()
        with self._changed:
            while not (peer.ready or peer.gone or peer.ended):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, _SLICE_S))
            if peer.ready and not peer.gone:
                return peer.name
            peer.gone = True
        peer.link.close()
        raise BackendUnavailable(
            f"{endpoint} answers, and UCX finds no path to it", backend=SCHEME, op="connect",
            hint="UCX_LOG_LEVEL=info says which devices it tries",
        )  # fmt: skip

    def disconnect(self, name: str) -> None:
        """See `TransferChannel.disconnect`."""
        with self._changed:
            peer = self._by_name.get(name)
            if peer is None or peer.gone:
                return
            self._part(peer)
        self._transfers.leave_all(peer, Status.FAILED)
        self._transfers.say_quiet(peer)
        self._maybe_end(peer)

    def tick(self) -> bool:
        """On the thread of transfers; whether somebody is connecting."""
        greeting = False
        now_s = time.monotonic()
        with self._changed:
            for peer in list(self._by_name.values()):
                if not peer.ready and not peer.gone:
                    greeting = True
                    self._greet(peer)
                    if now_s >= peer.deadline_s:
                        peer.link.close()
            self._forget()
            late = [peer for peer, end_s in self._leaving.items() if now_s >= end_s]
        for peer in late:
            peer.link.close()
        return greeting

    def close(self, timeout_s: float) -> None:
        """Leave every peer, and wait for them so long."""
        self._listener.close()
        with self._changed:
            self._open = False
            peers = list(self._by_name.values())
        for peer in peers:
            self.disconnect(peer.name)
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while self._leaving and time.monotonic() < end_s:
                self._changed.wait(_SLICE_S)
            left = list(self._by_name.values()) + list(self._leaving)
        for peer in left:
            peer.link.close()

    def _full(self) -> bool:
        with self._changed:
            return len(self._by_name) >= self._max_peers or not self._open

    def _introduce(self) -> Introduction:
        return Introduction(SCHEME, WIRE_VERSION, self._identity.pack())

    def _accepted(self, sock: socket.socket, hello: bytes, ours: Introduction) -> None:
        peer = self._made(sock, hello)
        if peer is not None:
            self._carry(peer)

    def _made(self, sock: socket.socket, hello: bytes) -> Peer | None:
        try:
            identity = Identity.read(hello)
        except Malformed:
            sock.close()
            return None
        with self._changed:
            if self._full() or identity.agent == self._identity.agent:
                sock.close()
                return None
            name = f"nixl-{next(self._numbers)}"
            peer = Peer(
                name=name,
                link=Link(name, hello, sock),
                identity=identity,
                nonce=os.urandom(NONCE_BYTES),
                deadline_s=time.monotonic() + GREETING_S,
            )
            self._by_name[name] = peer
            self._send_meta(peer)
        self._transfers.wake()
        return peer

    def _carry(self, peer: Peer) -> None:
        """The peer's link, until it ends."""

        def take(link: Link, kind: int, payload: bytes) -> None:
            try:
                self._takes.get(kind, _unknown)(peer, payload)
            except Malformed as error:
                self._host.logger.warning("%s sent a malformed %s", peer.name, error)
                link.close()

        why = peer.link.run(take)
        with self._changed:
            peer.ended = True
        self._lose(peer, why)
        with self._changed:
            self._leaving.pop(peer, None)
            if peer.greeting is not None:
                self._agent.release(peer.greeting)
                peer.greeting = None
            if peer.quiet:
                self._kept[peer.identity.agent] = None
            else:
                self._broken.append(peer)
            self._forget()
            self._changed.notify_all()
        if peer.quiet:
            self._granting.all_returned(peer)
        self._transfers.wake()

    def _forget(self) -> None:
        """Have the library forget agents whose link broke, and the oldest of those that left:
        each forgetting costs a socket that it never closes, so those that may return are kept."""
        several = list(self._by_name.values()) + list(self._leaving)
        used = {one.identity.agent for one in several}
        for peer in [one for one in self._broken if not one.running]:
            self._broken.remove(peer)
            if peer.identity.agent not in used:
                self._kept.pop(peer.identity.agent, None)
                self._agent.forget(peer.identity.agent)
        idle = [agent for agent in self._kept if agent not in used]
        for agent in idle[: max(0, len(idle) - self._max_peers)]:
            del self._kept[agent]
            self._agent.forget(agent)

    def _lose(self, peer: Peer, why: str) -> None:
        """On the link's thread."""
        with self._changed:
            known = peer.ready and not peer.gone
            if not peer.gone:
                self._part(peer)
            self._changed.notify_all()
        self._transfers.leave_all(peer, Status.FAILED)
        if known:
            self._host.lost(peer.name, why)

    def _part(self, peer: Peer) -> None:
        """No transfer and no notification from here on."""
        peer.gone = True
        self._by_name.pop(peer.name, None)
        if not peer.ended:
            self._leaving[peer] = time.monotonic() + LINGER_S
            peer.link.send(BYE, b"")
        self._transfers.wake()

    def _maybe_end(self, peer: Peer) -> None:
        """Nothing is left to say once both have said QUIET."""
        if peer.quiet and peer.said_quiet:
            peer.link.close()

    def _send_meta(self, peer: Peer) -> None:
        peer.meta_sent_s = self._host.clock()
        agent = self._agent
        meta = Meta(peer.nonce, self.sequence, agent.doormat, agent.metadata())
        if peer.link.send(META, pack_meta(meta)) is Status.REJECTED:
            peer.link.close()

    def _greet(self, peer: Peer) -> None:
        if peer.greeting is None or peer.greeted:
            return
        state = self._agent.state(peer.greeting)
        if state is State.RUNNING:
            return
        self._agent.release(peer.greeting)
        peer.greeting = None
        if state is State.FAILED:
            peer.link.close()
            return
        peer.greeted = True
        peer.link.send(READY, b"")
        self._changed.notify_all()

    def _on_meta(self, peer: Peer, payload: bytes) -> None:
        meta = read_meta(payload)
        with self._changed:
            if peer.gone:
                return
            if peer.theirs not in (b"", meta.nonce):
                raise Malformed("META")
            if not self._agent.add(meta.agent, peer.identity.agent):
                raise Malformed("META")
            first = peer.loaded < 0
            peer.theirs, peer.doormat, peer.loaded = meta.nonce, meta.doormat, meta.sequence
            peer.link.send(HAVE, pack_have(meta.sequence, self._host.clock()))
            if first:
                peer.greeting = self._agent.greet(peer.identity.agent, peer.doormat)
                if peer.greeting is None:
                    peer.link.close()
        self._transfers.wake()

    def _on_have(self, peer: Peer, payload: bytes) -> None:
        sequence, now_s = read_have(payload)
        with self._changed:
            if peer.theirs_loaded < 0:
                peer.offset_s = now_s - peer.meta_sent_s
            peer.theirs_loaded = max(peer.theirs_loaded, sequence)
            self._changed.notify_all()

    def _on_ready(self, peer: Peer, payload: bytes) -> None:
        with self._changed:
            peer.they_greeted = True
            self._changed.notify_all()

    def _on_poke(self, peer: Peer, payload: bytes) -> None:
        self._transfers.wake(active=True)

    def _on_notify(self, peer: Peer, payload: bytes) -> None:
        if not peer.gone and peer.ready:
            self._host.notified(peer.name, payload)

    def _on_revoke(self, peer: Peer, payload: bytes) -> None:
        number, left_s = read_revoke(payload)
        self._transfers.revoke(peer, number, self._host.clock() + left_s)
        self._transfers.hand_back()

    def _on_revoked(self, peer: Peer, payload: bytes) -> None:
        self._granting.returned(read_number(payload), peer)

    def _on_bye(self, peer: Peer, payload: bytes) -> None:
        self._lose(peer, "the peer disconnected")
        self._transfers.say_quiet(peer)
        self._maybe_end(peer)

    def _on_quiet(self, peer: Peer, payload: bytes) -> None:
        peer.quiet = True
        self._granting.all_returned(peer)
        self._lose(peer, "the peer disconnected")
        self._maybe_end(peer)


def _unknown(peer: Peer, payload: bytes) -> None:
    raise Malformed("frame")
