"""``nixl+ucx://``: NIXL's UCX plugin as a transfer channel; see `NixlChannel`."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections.abc import Sequence

from lmcache_backend_nixl.channel_peers import Peers
from lmcache_backend_nixl.channel_plugin import SCHEME
from lmcache_backend_nixl.channel_wire import (
    NOTIFY,
    REVOKE,
    Identity,
    Malformed,
    Ticket,
    pack_revoke,
    pack_ticket,
    read_ticket,
    rows_inside,
    span_bytes,
)
from lmcache_backend_nixl.granting import Granted, Granting
from lmcache_backend_nixl.library import load
from lmcache_backend_nixl.transfers import Peer, Transfer, Transfers
from lmcache_backend_nixl.ucx import VRAM, UcxAgent, kind_of
from lmcache_core.sdk import (
    MAX_GRANT_BYTES,
    Access,
    BackendClosed,
    BackendUnavailable,
    Buffer,
    ChannelCapabilities,
    ChannelHost,
    ContractViolation,
    Grant,
    MemoryKind,
    OpContext,
    Piece,
    Region,
    ReleaseToken,
    Status,
    TransferChannel,
)

MAX_PIECES = 1024
MAX_MESSAGE_BYTES = 64 << 10
MAX_LEASE_S = 365 * 86400.0
"""A longer lease ends then; times on the wire are finite."""
MAX_TICKETS = 256
"""Tickets whose reading is remembered."""
LOOK_S = 0.05
"""How often whoever waits for a peer looks whether its process is dead."""
LEAVE_S = 1.0
"""How long `NixlChannel.close` waits for peers to say that nothing of theirs runs."""
DRAIN_S = 1.0
END_S = 2.0
"""For the library's own end; after that it goes on in a daemon thread."""


class NixlChannel(TransferChannel):
    """Transfers by UCX: shared memory, RDMA or TCP, whichever it finds.  Thread-safe.

    What it does not claim, and why:

    - ``guarded``: a peer's NIC or kernel touches our memory, and nobody here sees it.  Span,
      access and lease are checked by the peer's copy of this class; each process that holds the
      token is trusted with all registered memory.
    - ``can_revoke``: a transfer in the library can't be stopped, so `revoke` asks the peer, which
      answers once none runs.  No answer is ABANDONED until the peer answers or its process is seen
      dead, on this host.  Of a peer on another host that vanished nothing is known: the spans stay
      abandoned.
    - ``ordered``: transfers overtake one another.  Notifications go over the authenticated
      connection, in order, each after the bytes that it speaks of.

    A transfer that is late or cancelled is ABANDONED unless it was not handed to the library yet.
    Over shared memory `write` and `read` move the bytes before they return.

    Args:
        url: ``nixl+ucx://HOST[:PORT]``.
        host: services of core.
        build: ``cu12``, ``cu13`` or ``auto``.
        max_peers, max_transfers: see `ChannelCapabilities`.

    Raises:
        ConfigError: the URL is wrong, or NIXL or its plugin can't be loaded.
        BackendUnavailable: the address can't be listened at.
    """

    def __init__(
        self, url: str, host: ChannelHost, *, build: str, max_peers: int, max_transfers: int
    ) -> None:
        self.capabilities = ChannelCapabilities(
            memory=frozenset({MemoryKind.HOST, MemoryKind.PINNED, MemoryKind.DEVICE}),
            one_sided=True,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_pieces=MAX_PIECES,
            max_transfers=max_transfers,
            max_peers=max_peers,
        )
        self._host = host
        self._pid = os.getpid()
        self._closed = False
        self._peers: Peers | None = None
        self._closing = threading.Lock()
        self._tickets: dict[tuple[bytes, bytes], Ticket] = {}
        identity = Identity.of_this_process(uuid.uuid4().hex)
        self._identity = identity
        Peers.check_url(url)
        self._agent = UcxAgent(load("UCX", build), identity.agent)
        self._granting = Granting(host.released)
        late = host.counter("nixl.late_transfers")
        self._transfers = Transfers(
            self._agent,
            clock=host.clock,
            released=host.released,
            late=lambda: late.inc(),
            tick=self._tick,
            failed=lambda error: host.logger.error("%s: %r", SCHEME, error),
            max_transfers=max_transfers,
        )
        try:
            self._peers = Peers(
                url, host, self._agent, self._transfers, self._granting, identity, max_peers
            )
        except BaseException:
            self._transfers.stop(DRAIN_S)
            self._agent.close()
            raise
        self._transfers.wake()

    def register(self, region: Region) -> None:
        """Peers are told at once; a transfer that needs it waits for them to know it.

        Device memory is written for, and has not run on hardware."""
        peers = self._check("register")
        self._agent.register(region)
        peers.announce()

    def unregister(self, region: Region) -> None:
        self._check("unregister")
        self._agent.unregister(region)

    def metadata(self) -> bytes:
        return str(self._check("metadata").endpoint).encode()

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        """Returns once both have loaded each other's agent, and read 8 bytes from the other: so
        the path stands, and later transfers over shared memory need nothing of the peer."""
        return self._check("connect").connect(metadata, ctx)

    def disconnect(self, peer: str) -> None:
        """Transfers that run in the library are ABANDONED, the others FAILED."""
        self._check("disconnect").disconnect(peer)

    def notify(self, peer: str, message: bytes) -> Status:
        found = self._check("notify").find(peer)
        if len(message) > MAX_MESSAGE_BYTES:
            return Status.REJECTED
        return Status.FAILED if found is None else found.link.send(NOTIFY, message)

    def grant(self, peer: str, spans: Sequence[Buffer], *, access: Access, lease_s: float) -> Grant:
        """Spans of one grant lie in one kind of memory, else ContractViolation."""
        peers = self._check("grant")
        self._check_local(spans, "grant")
        if span_bytes(len(spans)) > MAX_GRANT_BYTES or not spans:
            raise ContractViolation(f"{len(spans)} spans", backend=SCHEME, op="grant")
        found = peers.find(peer)
        if found is None:
            raise BackendUnavailable("the peer is gone", backend=SCHEME, op="grant")
        until_s = self._host.clock() + min(lease_s, MAX_LEASE_S)
        one = self._granting.add(found, tuple(spans), until_s)
        rows = tuple((span.address, span.nbytes) for span in spans)
        kind = kind_of(spans[0].memory)
        ticket = Ticket(one.number, until_s, peers.sequence, access, kind, rows)
        return Grant(one.number, pack_ticket(self._host.secret, found.nonce, ticket))

    def revoke(self, grant: Grant, ctx: OpContext) -> Status:
        self._check("revoke")
        one = self._granting.find(grant.number)
        if one is None:
            return Status.OK
        self._ask_back(one)
        return self._await_back(one, ctx)

    def write(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        self._check("write")
        return self._start("WRITE", peer, grant, pieces, ctx, notification)

    def read(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        self._check("read")
        if len(pieces) > 1 and _overlap([piece.local for piece in pieces]):
            raise ContractViolation("targets overlap", backend=SCHEME, op="read")
        return self._start("READ", peer, grant, pieces, ctx, notification)

    def poll(self, transfer: int) -> list[Status] | None:
        self._check("poll")
        return self._transfers.poll(transfer)

    def cancel(self, transfer: int) -> None:
        """ABANDONED where it runs in the library: that can't be stopped."""
        self._check("cancel")
        self._transfers.cancel(transfer)

    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        """ABANDONED too when a transfer of ours still runs in the library."""
        found = self._check("quiesce").find(peer)
        if found is None:
            return Status.OK
        self._transfers.leave_all(found, Status.TIMED_OUT)
        grants = self._granting.of(found)
        for one in grants:
            self._ask_back(one)
        statuses = [self._await_back(one, ctx) for one in grants]
        whole = all(status is Status.OK for status in statuses) and not found.running
        return Status.OK if whole else Status.ABANDONED

    def close(self) -> None:
        """Peers are asked to end what they run here, for `LEAVE_S`."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        if os.getpid() != self._pid or self._peers is None:
            return
        self._peers.close(LEAVE_S)
        self._transfers.stop(DRAIN_S)
        tokens = self._transfers.give_up()
        end = threading.Thread(target=self._end, args=(tokens,), name="nixl-ucx-end", daemon=True)
        end.start()
        end.join(END_S)

    def _end(self, tokens: Sequence[ReleaseToken]) -> None:
        try:
            self._agent.close()
        except Exception as error:
            self._host.logger.warning("NIXL does not end: %s", error)
            return
        for token in tokens:
            self._host.released(token)

    def _tick(self) -> bool:
        """On the thread of transfers: whether somebody is connecting."""
        if self._peers is None or self._closed:
            return False
        for peer in self._granting.gone_peers():
            self._judge(peer)
        return self._peers.tick()

    def _start(
        self,
        op: str,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        notification: bytes,
    ) -> int:
        locals_ = [piece.local for piece in pieces]
        self._check_local(locals_, op.lower())
        if len(notification) > MAX_MESSAGE_BYTES:
            raise ContractViolation(
                f"a notification of {len(notification)} bytes", backend=SCHEME, op=op.lower()
            )
        assert self._peers is not None
        found = self._peers.find(peer)
        if found is None:
            return self._transfers.refuse(Status.FAILED, len(pieces))
        ticket = self._read(found, grant)
        access = Access.WRITE if op == "WRITE" else Access.READ
        if (
            ticket is None
            or ticket.access is not access
            or self._host.clock() + found.offset_s >= ticket.until_s
        ):
            return self._transfers.refuse(Status.REJECTED, len(pieces))
        statuses = [Status.OK] * len(pieces)
        near, far, moved = [], [], []
        for at, piece in enumerate(pieces):
            local = piece.local
            address = rows_inside(ticket.spans, piece.span, piece.offset, local.nbytes)
            if address is None:
                statuses[at] = Status.REJECTED
            elif local.nbytes:
                near.append((local.address, local.nbytes, 0))
                far.append((address, local.nbytes, 0))
                moved.append(at)
        return self._transfers.start(
            Transfer(
                peer=found,
                grant=ticket.number,
                sequence=ticket.sequence,
                op=op,
                kinds=(kind_of(locals_[0].memory) if locals_ else ticket.kind, ticket.kind),
                rows=(near, far),
                moved=moved,
                tokens=[locals_[at].token for at in moved],
                statuses=statuses,
                whole=Status.REJECTED not in statuses,
                deadline_s=ctx.deadline_s,
                notification=notification,
            )
        )

    def _read(self, peer: Peer, packed: bytes) -> Ticket | None:
        known = self._tickets.get((peer.theirs, packed))
        if known is not None:
            return known
        try:
            ticket = read_ticket(self._host.secret, peer.theirs, packed)
        except Malformed:
            return None
        if ticket.kind > VRAM:
            return None
        if len(self._tickets) >= MAX_TICKETS:
            self._tickets = {}
        self._tickets[peer.theirs, packed] = ticket
        return ticket

    def _check_local(self, buffers: Sequence[Buffer], op: str) -> None:
        if len(buffers) > MAX_PIECES:
            raise ContractViolation(
                f"{len(buffers)} pieces, max_pieces is {MAX_PIECES}", backend=SCHEME, op=op
            )
        if len(buffers) > 1 and len({kind_of(buffer.memory) for buffer in buffers}) > 1:
            raise ContractViolation("several kinds of memory in one call", backend=SCHEME, op=op)
        if not self._agent.covers(buffers):
            raise ContractViolation(
                "memory outside of every registered region",
                backend=SCHEME,
                op=op,
                hint="register its region first",
            )

    def _ask_back(self, one: Granted) -> None:
        if not one.asked:
            left_s = max(0.0, one.until_s - self._host.clock())
            payload = pack_revoke(one.number, left_s)
            # A full link is asked again by the next revoke.
            one.asked = one.peer.link.send(REVOKE, payload) is Status.OK

    def _await_back(self, one: Granted, ctx: OpContext) -> Status:
        while True:
            if one.peer.ended:
                self._judge(one.peer)
            left_s = ctx.remaining_s(self._host.clock())
            if self._granting.wait(one, min(left_s, LOOK_S)):
                return Status.OK
            if left_s <= 0:
                return Status.ABANDONED if self._granting.abandon(one) else Status.OK

    def _judge(self, peer: Peer) -> None:
        """Its link has ended: nothing can come of it when it said so, or its process is dead."""
        if peer.quiet or peer.identity.surely_dead(self._identity):
            peer.quiet = True
            self._granting.all_returned(peer)

    def _check(self, op: str) -> Peers:
        if self._closed or os.getpid() != self._pid or self._peers is None:
            why = "closed" if self._closed else "opened in another process"
            raise BackendClosed(
                f"the channel was {why}", backend=SCHEME, op=op, hint="open it again"
            )
        return self._peers


def _overlap(buffers: Sequence[Buffer]) -> bool:
    ends = sorted((one.address, one.nbytes) for one in buffers if one.nbytes)
    return any(at + size > after for (at, size), (after, _) in itertools.pairwise(ends))
