"""Channels that break one rule each: ``tcp://``, changed in one place.  A module of its own, since
the process of a peer opens them too."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lmcache_core.channels import tcp, tcp_lane
from lmcache_core.channels.tcp import TcpChannel
from lmcache_core.channels.tcp_peers import Peers
from lmcache_core.sdk import (
    Access,
    BackendUnavailable,
    Buffer,
    ChannelHost,
    ChannelPlugin,
    ConfigError,
    Grant,
    Grants,
    OpContext,
    Part,
    Piece,
    Status,
)
from lmcache_core.sdk.links import Endpoint


class Right(TcpChannel):
    """Nothing is changed.

    Attributes:
        kills: the check that must find it.
        patches: what of the handshake is replaced while it is judged.
        grants: how it keeps what it has granted.
        peers: how it keeps its connections.
    """

    kills: ClassVar[str] = ""
    patches: ClassVar[Mapping[str, Any]] = {}
    grants: ClassVar[type[Grants]] = Grants
    peers: ClassVar[type[Peers]] = Peers
    plugin: ClassVar[ChannelPlugin]

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        super().__init__(endpoint, host, max_peers=max_peers)
        # What answers a peer looks at the same grants.
        self._grants = self._peers._grants = self.grants(host.clock)
        self._peers.__class__ = self.peers

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.plugin = plugin_of(cls)

    @classmethod
    def spec(cls) -> str:
        """Of its plugin, for `Source`."""
        return f"{__name__}:{cls.__name__}.plugin"


def plugin_of(kind: type[TcpChannel]) -> ChannelPlugin:
    def opened(url: str, options: Mapping[str, Any], host: ChannelHost) -> TcpChannel:
        return kind(Endpoint.parse(url, "tcp"), host, max_peers=int(options["max_peers"]))

    return ChannelPlugin(scheme="tcp", open=opened, options=tcp.plugin.options)


Right.plugin = plugin_of(Right)


class RoundsOffsets(Right):
    """Writes where the memory is aligned."""

    kills = "T1"

    def write(self, peer: str, grant: bytes, pieces: Sequence[Piece], ctx: OpContext,
              *, notification: bytes = b"") -> int:  # fmt: skip
        rounded = [piece._replace(offset=piece.offset & ~7) for piece in pieces]
        return super().write(peer, grant, rounded, ctx, notification=notification)


class _LaneOneWay(Peers):
    def _lane(self, peer: Any, deadline_s: float) -> Any:
        if peer.dialled is None:
            raise BackendUnavailable("we did not dial")
        return super()._lane(peer, deadline_s)


class OneDirectionOnly(Right):
    """Only the side that connected can transfer."""

    kills = "T1"
    peers = _LaneOneWay


class NotifiesBeforeData(Right):
    """Sends the notification of a write first."""

    kills = "T2"

    def write(self, peer: str, grant: bytes, pieces: Sequence[Piece], ctx: OpContext,
              *, notification: bytes = b"") -> int:  # fmt: skip
        if notification:
            self.notify(peer, notification)
        return super().write(peer, grant, pieces, ctx)


class _TellTwice(Peers):
    def _notified(self, peer: Any, message: bytes) -> None:
        super()._notified(peer, message)
        if message.endswith(b"00"):
            super()._notified(peer, message)


class NotifiesTwice(Right):
    """Hands every hundredth notification over twice."""

    kills = "T2"
    peers = _TellTwice


class NotifiesLate(Right):
    """A notification may be overtaken by the next."""

    kills = "T2"

    def notify(self, peer: str, message: bytes) -> Status:
        if message == b"50":
            threading.Timer(0.02, super().notify, (peer, message)).start()
            return Status.OK
        return super().notify(peer, message)


class _Overtaking(tcp_lane.Asking):
    def start(self, transfer: Any) -> None:
        super().start(transfer)
        with self._changed:
            ordered = sorted(self._queue, key=lambda each: each.request.parts[0].nbytes)
            self._queue.clear()
            self._queue.extend(ordered)


class _JoinOvertaking(Peers):
    def _join(self, *arguments: Any) -> Any:
        peer = super()._join(*arguments)
        peer.asking.__class__ = _Overtaking
        return peer


class SmallOnesOvertake(Right):
    """Claims order, and starts small transfers first."""

    kills = "T3"
    peers = _JoinOvertaking


class NotifiesAnyway(Right):
    """Sends the notification when the transfer has ended, however it did."""

    kills = "T4"

    def _start(self, op: Any, peer: str, grant: bytes, pieces: Any, ctx: OpContext,
               notification: bytes) -> int:  # fmt: skip
        number = super()._start(op, peer, grant, pieces, ctx, b"")
        transfer = self._transfers[number]

        def tell() -> None:
            transfer.ended.wait(5)
            self.notify(peer, notification)

        if notification:
            threading.Thread(target=tell, daemon=True).start()
        return number


class AnswersBackwards(Right):
    """The last piece's answer comes first."""

    kills = "T4"

    def poll(self, transfer: int) -> list[Status] | None:
        answers = super().poll(transfer)
        return answers and answers[::-1]


class OneIsAll(Right):
    """One piece that is OK makes all OK."""

    kills = "T4"

    def poll(self, transfer: int) -> list[Status] | None:
        answers = super().poll(transfer)
        return [Status.OK] * len(answers) if answers and Status.OK in answers else answers


class _NoRange(Grants):
    @staticmethod
    def _span(one: Any, part: Part) -> Buffer | None:
        if not 0 <= part.span < len(one.spans):
            return None
        span = one.spans[part.span]
        at = span.address - span.region.address
        whole = memoryview(span.view.obj)[at:]
        inside = 0 <= part.offset <= len(whole) - part.nbytes
        return replace(span, view=whole, nbytes=len(whole)) if inside else None


class NoRangeCheck(Right):
    """Looks whether a piece lies in the region, not in its span."""

    kills = "T4"
    grants = _NoRange


class _AnyAccess(Grants):
    def enter(self, number: int, peer: str, access: Access, parts: Any) -> Any:
        one = self._open.get(number)
        return super().enter(number, peer, one.access if one else access, parts)


class NoAccessCheck(Right):
    """Who may write may read."""

    kills = "T5"
    grants = _AnyAccess


class _AnyPeer(Grants):
    def enter(self, number: int, peer: str, access: Access, parts: Any) -> Any:
        one = self._open.get(number)
        return super().enter(number, one.peer if one else peer, access, parts)


class AnyPeersTicket(Right):
    """A ticket is good for whoever has it."""

    kills = "T5"
    grants = _AnyPeer


class BadTicketEndsAll(Right):
    """Takes a bad ticket for an attack."""

    kills = "T5"

    def _start(self, op: Any, peer: str, grant: bytes, *rest: Any) -> int:
        number = super()._start(op, peer, grant, *rest)
        if len(grant) != 16:
            self.disconnect(peer)
        return number


class _NoWait(Grants):
    def revoke(self, number: int, timeout_s: float) -> bool:
        super().revoke(number, 0.0)
        return True

    def live(self, number: int) -> bool:
        return True


class RevokeDoesNotWait(Right):
    """Lets nobody in any more, and does not wait for who is inside."""

    kills = "T6"
    grants = _NoWait


class RevokesOnce(Right):
    """A grant that was revoked is an error."""

    kills = "T6"

    def revoke(self, grant: Grant, ctx: OpContext) -> Status:
        known = bool(self._grants.spans(grant.number))
        return super().revoke(grant, ctx) if known else Status.FAILED


class _ForEver(Grants):
    def add(self, peer: str, spans: Sequence[Buffer], access: Access, lease_s: float) -> int:
        return super().add(peer, spans, access, 1e9)


class LeaseIgnored(Right):
    """A grant ends when it is revoked only."""

    kills = "T7"
    grants = _ForEver


class _PartTwice(Peers):
    def part(self, peer: Any, why: str = "") -> None:
        was_gone = peer.gone
        super().part(peer, why)
        if why and not was_gone:
            self._host.lost(peer.name, "its lane has ended")


class LostTwice(Right):
    """Tells `lost` of the link and of its lanes."""

    kills = "T8"
    peers = _PartTwice


class _PartSilently(Peers):
    def part(self, peer: Any, why: str = "") -> None:
        super().part(peer)


class LostNever(Right):
    """Tells nobody that a peer is gone."""

    kills = "T8"
    peers = _PartSilently


class DeadlineIgnored(Right):
    """A transfer has ten seconds more."""

    kills = "T9"

    def _start(self, op: Any, peer: str, grant: bytes, pieces: Any, ctx: OpContext,
               notification: bytes) -> int:  # fmt: skip
        later = replace(ctx, deadline_s=ctx.deadline_s + 10)
        return super()._start(op, peer, grant, pieces, later, notification)


class _Patient(Grants):
    def live(self, number: int) -> bool:
        return True


class RevokeWaitsForThePeer(Right):
    """Claims that it can revoke, and needs the peer to go on for it."""

    kills = "T9"
    grants = _Patient


class AnyToken(Right):
    """All tokens are equal."""

    kills = "T10"

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        super().__init__(endpoint, replace(host, secret=b"0" * 32), max_peers=max_peers)


class TokenInMetadata(Right):
    """Tells peers the token with the address."""

    kills = "T10"

    def metadata(self) -> bytes:
        return super().metadata() + b"/" + self._host.secret.hex().encode()

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        return super().connect(b"/".join(metadata.split(b"/")[:3]), ctx)


class TokenInTheLog(Right):
    """Says too much of a refusal."""

    kills = "T10"

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        self._host.logger.debug("connecting with %s", self._host.secret.hex())
        return super().connect(metadata, ctx)


class TokenOnTheWire(Right):
    """Says the token to whom it has met."""

    kills = "T10"

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        peer = super().connect(metadata, ctx)
        found = self._peers.get(peer)
        assert found is not None
        found.link.send(77, self._host.secret)
        return peer


class _FixedNonce:
    @staticmethod
    def token_bytes(count: int) -> bytes:
        return b"\1" * count


class FixedNonce(Right):
    """Its challenge is the same each time."""

    kills = "T11"
    patches: ClassVar[Mapping[str, Any]] = {"secrets": _FixedNonce}


class AnyVersion(Right):
    """Talks to whoever knows the token."""

    kills = "T12"
    patches: ClassVar[Mapping[str, Any]] = {"_judge": lambda opening, ours: 0}


class HoldsTheRefused(Right):
    """Keeps a thread for each connection that was refused."""

    kills = "T13"

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        super().__init__(endpoint, host, max_peers=max_peers)
        self._done = threading.Event()
        self._peers._listener._refused = self._keep

    def _keep(self, why: str) -> None:
        if len(threading.enumerate()) < 60:
            threading.Thread(target=self._done.wait, args=(60,), daemon=True).start()

    def close(self) -> None:
        self._done.set()
        super().close()


class TellsOfTheRefused(Right):
    """`lost` is told of connections that never were a peer."""

    kills = "T13"

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        super().__init__(endpoint, host, max_peers=max_peers)
        self._peers._listener._refused = lambda why: host.lost("nobody", why)


class LeaksAThread(Right):
    """Keeps a thread for each peer that it had."""

    kills = "T14"

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        threading.Thread(target=time.sleep, args=(15,), daemon=True).start()
        return super().connect(metadata, ctx)


class LeaksAFile(Right):
    """Keeps a descriptor for each peer that it had."""

    kills = "T14"

    def disconnect(self, peer: str) -> None:
        self._kept = [*getattr(self, "_kept", []), os.open("/dev/null", os.O_RDONLY)]
        super().disconnect(peer)

    def close(self) -> None:
        for each in getattr(self, "_kept", []):
            os.close(each)
        self._kept = []
        super().close()


class _Keeps(Grants):
    def revoke(self, number: int, timeout_s: float) -> bool:
        self.__dict__.setdefault("kept", []).append(self.spans(number))
        return super().revoke(number, timeout_s)


class LeaksGrants(Right):
    """Remembers every grant."""

    kills = "T14"
    grants = _Keeps


class CutsMessages(Right):
    """Sends what fits of a notification that is too long."""

    kills = "T15"

    def _start(self, op: Any, peer: str, grant: bytes, pieces: Any, ctx: OpContext,
               notification: bytes) -> int:  # fmt: skip
        most = self.capabilities.max_message_bytes
        return super()._start(op, peer, grant, pieces, ctx, notification[:most])


class AnyMemory(Right):
    """Moves memory that nobody has registered."""

    kills = "T15"

    def _check_buffers(self, buffers: Sequence[Buffer], op: str) -> None:
        if len(buffers) > self.capabilities.max_pieces:
            super()._check_buffers(buffers, op)


class _JoinUnbounded(Peers):
    def _join(self, *arguments: Any) -> Any:
        peer = super()._join(*arguments)
        peer.asking._max_transfers = 1 << 30
        return peer


class AnyNumberOfTransfers(Right):
    """Queues without a bound."""

    kills = "T15"
    peers = _JoinUnbounded


class AnyNumberOfPeers(Right):
    """Takes every peer."""

    kills = "T15"

    def __init__(self, endpoint: Endpoint, host: ChannelHost, *, max_peers: int = 64) -> None:
        super().__init__(endpoint, host, max_peers=4096)


class CancelDoesNothing(Right):
    """Waits for the deadline."""

    kills = "T16"

    def cancel(self, transfer: int) -> None:
        return


class QuiesceDoesNothing(Right):
    """Says that all is quiet."""

    kills = "T16"

    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        return Status.OK


class QuiesceDisconnects(Right):
    """Ends the connection too."""

    kills = "T16"

    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        status = super().quiesce(peer, ctx)
        self.disconnect(peer)
        return status


class CloseHangs(Right):
    """Waits for something at close."""

    kills = "T17"

    def close(self) -> None:
        if not self._closed:
            time.sleep(6.0)
        super().close()


class WorksAfterFork(Right):
    """Does not see that it is in another process."""

    kills = "T17"

    def __getattribute__(self, name: str) -> Any:
        return os.getpid() if name == "_pid" else super().__getattribute__(name)


class AnswersAfterClose(Right):
    """A closed channel says that the peer is gone."""

    kills = "T17"

    def notify(self, peer: str, message: bytes) -> Status:
        return Status.FAILED if self._closed else super().notify(peer, message)


class AnyMetadata(Right):
    """Takes what is no metadata for a peer that is away."""

    kills = "T18"

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        try:
            return super().connect(metadata, ctx)
        except ConfigError as error:
            raise BackendUnavailable("not there") from error


class ConnectIsPatient(Right):
    """Waits three seconds for a handshake, whatever the deadline."""

    kills = "T18"

    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        return super().connect(metadata, replace(ctx, deadline_s=ctx.deadline_s + 3))


class _Wraps(_NoRange):
    @staticmethod
    def _span(one: Any, part: Part) -> Buffer | None:
        cut = part._replace(offset=part.offset & 0xFFFF) if part.offset > 0 else part
        found = Grants._span(one, cut)
        return _NoRange._span(one, part) if found is not None and cut != part else found


class ChecksTheLowBits(Right):
    """Large offsets wrap when they are checked, and do not when they are used."""

    kills = "T19"
    grants = _Wraps


WRONG: list[type[Right]] = [
    each
    for each in list(globals().values())
    if isinstance(each, type) and issubclass(each, Right) and each.kills
]
