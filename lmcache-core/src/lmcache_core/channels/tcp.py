"""``tcp://HOST:PORT``: the reference channel, over blocking sockets.

A connection to a peer is one link for notifications and, as they are needed, one lane for the
transfers of either side.  The side that dials opens all of them, so only one must be reachable.
Bytes are sent from and received into the memory they belong to.  They are not encrypted: use it
inside a network that you trust, or through a tunnel.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from lmcache_core.channels.tcp_lane import Transfer
from lmcache_core.channels.tcp_peers import SCHEME, Peers
from lmcache_core.channels.tcp_wire import NO_SPAN, READ, WRITE, Request, number_of, ticket_of
from lmcache_core.sdk import (
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
    MemoryKind,
    OpContext,
    OptionSpec,
    OptionValue,
    Part,
    Piece,
    Region,
    Status,
    TransferChannel,
    check_ranges,
)


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
        self._transfers: dict[int, Transfer] = {}
        self._numbers = itertools.count(1)
        self._peers = Peers(endpoint, host, self._grants, self.capabilities)

    def register(self, region: Region) -> None:
        self._check_open("register")
        self._regions[region.region_id] = region

    def unregister(self, region: Region) -> None:
        self._check_open("unregister")
        self._regions.pop(region.region_id, None)

    def metadata(self) -> bytes:
        self._check_open("metadata")
        return str(self._peers.endpoint).encode()

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
        until_s = time.monotonic() + max(0.0, ctx.deadline_s - self._host.clock())
        return self._peers.connect(endpoint, until_s).name

    def disconnect(self, peer: str) -> None:
        self._check_open("disconnect")
        found = self._peers.get(peer)
        if found is not None:
            self._peers.part(found)

    def notify(self, peer: str, message: bytes) -> Status:
        self._check_open("notify")
        found = self._peers.get(peer)
        if len(message) > self.capabilities.max_message_bytes:
            return Status.REJECTED
        return Status.FAILED if found is None else self._peers.notify(found, message)

    def grant(self, peer: str, spans: Sequence[Buffer], *, access: Access, lease_s: float) -> Grant:
        self._check_open("grant")
        self._check_buffers(spans, "grant")
        if self._peers.get(peer) is None:
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
        self._peers.spawn(partial(self._release_late, grant.number, spans), "tcp-revoke")
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
        self._peers.close()

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

    def _release_late(self, number: int, spans: Sequence[Buffer]) -> None:
        while not self._grants.revoke(number, 1.0):
            pass
        for span in spans:
            self._host.released(span.token)


def _part(piece: Piece) -> Part:
    """``piece`` as it is named to the peer; what no grant can hold is named as no span."""
    nameable = 0 <= piece.span < NO_SPAN and 0 <= piece.offset < 1 << 63
    span, offset = (piece.span, piece.offset) if nameable else (NO_SPAN, 0)
    return Part(span, offset, piece.local.nbytes)


def _open(url: str, options: Mapping[str, OptionValue], host: ChannelHost) -> TransferChannel:
    check_ranges(options, {"max_peers": (1, 4096)}, backend=SCHEME)
    return TcpChannel(Endpoint.parse(url, SCHEME), host, max_peers=int(options["max_peers"]))


plugin = ChannelPlugin(
    scheme=SCHEME,
    open=_open,
    options=(OptionSpec(name="max_peers", type=int, default=64, help="peers at the same time"),),
)
