"""Transfer channels: how one engine's memory is written and read by another engine.

A distribution offers one as an entry point of the group ``lmcache.channels.v1``: the entry's name
is the URL scheme, its object a `ChannelPlugin`.  The pattern (register, connect, post, poll) is
that of NIXL's agents; what is added here is that a peer must authenticate, and that it names spans
of a grant, never an address.
"""

from __future__ import annotations

import enum
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_core.sdk.buffers import Buffer, MemoryKind, Region, ReleaseToken
from lmcache_core.sdk.connector import OpContext
from lmcache_core.sdk.errors import LMCacheError
from lmcache_core.sdk.hookspecs import Counter, OptionSpec, OptionValue, Probe
from lmcache_core.sdk.status import Status

CHANNEL_API_VERSION: tuple[int, int] = (1, 0)
"""Version of the contract of channels."""
CHANNEL_GROUP = "lmcache.channels.v1"
"""Entry-point group of channels; the entry's name is the URL scheme."""
MAX_GRANT_BYTES = 32 << 10
"""Of a grant's ``ticket``, which travels in a notification."""


class Access(enum.Enum):
    """What a peer may do with the spans of a grant."""

    READ = "read"
    WRITE = "write"


class PeerRefused(LMCacheError):
    """The other side was reached, and one of the two does not want the other.

    Attributes:
        reason: ``"token"``, ``"version"``, ``"scheme"`` or ``"full"``.
    """

    def __init__(self, reason: str, message: str, *, backend: str = "", hint: str = "") -> None:
        super().__init__(message, backend=backend, op="connect", hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelCapabilities:
    """Constant after open.  The default of a field means "not claimed".

    Attributes:
        memory: kinds of memory that spans may lie in.
        one_sided: the processor of the side that granted takes no part in a transfer.
        ordered: transfers to one peer, and their notifications, arrive in the order in which
            they were started.
        can_revoke: `TransferChannel.revoke` ends what is in flight, and answers OK also when the
            peer stands still.
        guarded: the side that granted checks every access; else the peer's library does, so
            every process that holds the token must be trusted with the registered memory.
        max_message_bytes: of one notification.
        max_pieces: in one transfer, and spans in one grant.
        max_transfers: to one peer at the same time; more are REJECTED.
        max_peers: at the same time.
    """

    memory: frozenset[MemoryKind] = field(default_factory=lambda: frozenset({MemoryKind.HOST}))
    one_sided: bool = False
    ordered: bool = False
    can_revoke: bool = False
    guarded: bool = False
    max_message_bytes: int = 64 << 10
    max_pieces: int = 256
    max_transfers: int = 64
    max_peers: int = 64


@dataclass(frozen=True, slots=True)
class Grant:
    """Spans that one peer may touch until the lease ends.

    Attributes:
        number: of this channel's grants; never used again.
        ticket: what the peer needs to name them; at most `MAX_GRANT_BYTES`.  No secret: it is
            worth nothing to another peer.
    """

    number: int
    ticket: bytes


class Piece(NamedTuple):
    """One contiguous part of a transfer: all of ``local``, to or from ``offset`` in span number
    ``span`` of the grant."""

    local: Buffer
    span: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelHost:
    """What core lends to a channel for its life.  The callbacks come from the channel's threads,
    one at a time for one peer, and return soon.

    Attributes:
        logger: named after the channel.
        counter: gives the counter of a name.
        clock: monotonic seconds, the clock of `OpContext.deadline_s`.
        secret: the token that peers must know; never sent, never logged.
        released: call once when a buffer answered ABANDONED can't be touched any more.
        notified: a peer's notification has come.  That of a `TransferChannel.write` comes when
            its bytes can be read here.
        lost: the peer is gone, with the reason; once a peer, and nothing of it comes later.
    """

    logger: logging.Logger
    counter: Callable[[str], Counter]
    secret: bytes = field(repr=False)
    clock: Callable[[], float] = time.monotonic
    released: Callable[[ReleaseToken], None] = lambda token: None
    notified: Callable[[str, bytes], None] = lambda peer, message: None
    lost: Callable[[str, str], None] = lambda peer, why: None


class TransferChannel(ABC):
    """One side of a channel: listens, connects, grants, writes and reads.  Thread-safe.

    Rules for every method (the conformance suite checks each):

    - A peer is known by a name that is given once; it authenticates before anything else.
    - Nobody touches memory outside of a grant that was given to it and has neither ended nor
      been revoked; such a piece is REJECTED.
    - Answers are one `Status` a piece, in order.  OK: the bytes are there.  REJECTED: nothing of
      the piece was touched.  TIMED_OUT, FAILED: the target's bytes of the piece are undefined,
      ``local`` is the caller's again.  ABANDONED: native code may still touch ``local``, until
      `ChannelHost.released` of its token.
    - A deadline never raises, and no call but `connect`, `revoke`, `quiesce` and `close` waits for
      a peer; `write` and `read` may move bytes before they return.
    - After `close`, or in a forked child: `BackendClosed`.

    Attributes:
        capabilities: constant after open.
    """

    capabilities: ChannelCapabilities

    @abstractmethod
    def register(self, region: Region) -> None:
        """Make the buffers of ``region`` usable, as ``local`` and in grants."""

    @abstractmethod
    def unregister(self, region: Region) -> None:
        """Forget ``region``; no grant and no transfer of it is open."""

    @abstractmethod
    def metadata(self) -> bytes:
        """Where peers reach this channel, for `connect`: a URL with the real port; no secret."""

    @abstractmethod
    def connect(self, metadata: bytes, ctx: OpContext) -> str:
        """Reach a peer; returns its name.  A connection serves both directions: the other side
        knows us, under a name of its own, from our first notification on.

        Raises:
            BackendUnavailable: nobody answers there, or not before the deadline.
            PeerRefused: token, version, scheme, or too many peers.
            ConfigError: these are no metadata of this kind of channel.
        """

    @abstractmethod
    def disconnect(self, peer: str) -> None:
        """End the connection; transfers end as FAILED or ABANDONED, `ChannelHost.lost` is not
        called for it here.  Grants stay to be revoked.  An unknown peer is fine."""

    @abstractmethod
    def notify(self, peer: str, message: bytes) -> Status:
        """Send a notification of at most ``max_message_bytes``.  OK: it is on its way, in the
        order of notifications to this peer.  REJECTED: too large, or too much waits.  FAILED: the
        peer is gone."""

    @abstractmethod
    def grant(self, peer: str, spans: Sequence[Buffer], *, access: Access, lease_s: float) -> Grant:
        """Let ``peer`` write or read ``spans`` until ``lease_s`` from now; a day at most is needed.

        Raises:
            ContractViolation: a span outside of every registered region, or over ``max_pieces``.
            BackendUnavailable: the peer is gone.
        """

    @abstractmethod
    def revoke(self, grant: Grant, ctx: OpContext) -> Status:
        """End ``grant``, also one whose lease has ended: its memory must not be used otherwise
        before.  OK: nobody can touch the spans any more.  ABANDONED: a peer still may; each
        span's token is released when it no longer can.  Waits at most until the deadline.  A
        grant that was revoked is OK."""

    @abstractmethod
    def write(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        """Start to write every piece into the peer's memory; ``notification`` is handed to it
        when all of them are there, and not when one is not.  Returns a number for `poll`.

        Raises:
            ContractViolation: over ``max_pieces`` or ``max_message_bytes``, or a ``local``
                outside of every registered region.  Nothing was touched.
        """

    @abstractmethod
    def read(
        self,
        peer: str,
        grant: bytes,
        pieces: Sequence[Piece],
        ctx: OpContext,
        *,
        notification: bytes = b"",
    ) -> int:
        """Like `write`, from the peer's memory into every ``local``; these must not overlap."""

    @abstractmethod
    def poll(self, transfer: int) -> list[Status] | None:
        """The answers once all pieces are decided, else None.  The number is forgotten with the
        answers.

        Raises:
            ContractViolation: no transfer of ours has the number.
        """

    @abstractmethod
    def cancel(self, transfer: int) -> None:
        """Want it no more: it ends soon, with the pieces that are not there TIMED_OUT, or
        ABANDONED where native code goes on.  A number that is forgotten is fine."""

    @abstractmethod
    def quiesce(self, peer: str, ctx: OpContext) -> Status:
        """End our transfers with ``peer`` and every grant that it holds, as `cancel` and
        `revoke` do; both sides stay connected.  ABANDONED when one of them could not be ended
        before the deadline."""

    @abstractmethod
    def close(self) -> None:
        """End everything, within `CLOSE_LIMIT_S` seconds.  Idempotent.  Memory of grants that
        could not be ended stays out of use, as after `revoke`."""

    def wait(self, transfer: int, timeout_s: float) -> list[Status] | None:
        """`poll`, which waits at most ``timeout_s`` for the answers."""
        end_s = time.monotonic() + timeout_s
        pause_s = 0.0
        while (answers := self.poll(transfer)) is None:
            if time.monotonic() >= end_s:
                return None
            time.sleep(pause_s)
            pause_s = min(pause_s + 10e-6, 1e-3)
        return answers


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPlugin:
    """What an entry point names.  Made without a native import.

    Attributes:
        scheme: equal to the entry point's name.
        api_min: lowest `CHANNEL_API_VERSION` that it runs with.
        open: makes a channel of a URL without options, the validated options, and the host.
            Raises ConfigError (the URL is wrong, something is not installed) and
            BackendUnavailable (the address can't be listened at).  A URL without a port, or with
            port 0, listens at a free one.
        options: every option of its URL.
        probe: whether it can work here; no side effect.
    """

    scheme: str
    open: Callable[[str, Mapping[str, OptionValue], ChannelHost], TransferChannel]
    api_min: tuple[int, int] = CHANNEL_API_VERSION
    options: tuple[OptionSpec, ...] = ()
    probe: Callable[[], Probe] = lambda: Probe(usable=True, reason="needs nothing")
