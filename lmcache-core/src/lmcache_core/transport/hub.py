"""`Hub`: one channel, the peers that are reached over it, and who is told what they say."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from lmcache_core.channels.registry import Channels
from lmcache_core.logs import EventLog, logger
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    ChannelHost,
    LMCacheError,
    OpContext,
    Region,
    ReleaseToken,
    Status,
    TransferChannel,
)
from lmcache_core.transport.messages import Have, Lent, Message, decode, encode

RETRY_S = 1.0
"""How long a peer that could not be reached is not tried again."""
MAX_ADDRESSES = 1024

M = TypeVar("M")


class Hub:
    """Thread-safe.  Messages are told in the channel's threads, one at a time for one peer.

    Args:
        url: of the channel, with the address to listen at.
        region: memory that transfers go from and to.
        released: see `ChannelHost.released`.

    Raises:
        ConfigError, BackendUnavailable: the channel can't be opened.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: bytes,
        region: Region,
        metrics: Metrics,
        released: Callable[[ReleaseToken], None],
        clock: Callable[[], float] = time.monotonic,
        channels: Channels | None = None,
    ) -> None:
        self.clock = clock
        self._metrics = metrics
        self._log = EventLog(clock)
        self._handlers: dict[type, Callable[[str, Any], None]] = {}
        self._on_lost: list[Callable[[str], None]] = []
        self._asks = itertools.count(1)
        self._answers: dict[int, _Answer] = {}
        self._lock = threading.Lock()
        self._reached: dict[str, str] = {}
        self._reaching: dict[str, threading.Lock] = {}
        self._failed: dict[str, tuple[float, LMCacheError]] = {}
        host = ChannelHost(
            logger=logger,
            counter=lambda name: metrics.counter(f"channel.{name}"),
            secret=secret,
            clock=clock,
            released=released,
            notified=self._notified,
            lost=self._lost,
        )
        self.channel: TransferChannel = (channels or Channels()).open(url, host)
        self.channel.register(region)

    @property
    def address(self) -> str:
        """Where peers reach us."""
        return self.channel.metadata().decode("ascii", "replace")

    def on(self, kind: type[M], handler: Callable[[str, M], None]) -> None:
        """Have ``handler`` told the peer and each message of ``kind``."""
        self._handlers[kind] = handler

    def on_lost(self, handler: Callable[[str], None]) -> None:
        """Have ``handler`` told each peer that is gone."""
        self._on_lost.append(handler)

    def reach(self, address: str, deadline_s: float) -> str:
        """The peer that listens at ``address``; blocks until it is connected.

        Raises:
            BackendUnavailable, PeerRefused, ConfigError: see `TransferChannel.connect`; for
                `RETRY_S` afterwards without another try.
        """
        with self._lock:
            if len(self._reaching) >= MAX_ADDRESSES:
                self._reaching.clear()
            one_at_a_time = self._reaching.setdefault(address, threading.Lock())
        with one_at_a_time:
            peer = self._reached.get(address)
            if peer is not None:
                return peer
            failed_s, error = self._failed.get(address, (0.0, None))
            if error is not None and self.clock() - failed_s < RETRY_S:
                raise error
            try:
                peer = self.channel.connect(address.encode(), OpContext(deadline_s=deadline_s))
            except LMCacheError as caught:
                # Who had too little time says nothing of the peer to the others.
                if self.clock() < deadline_s:
                    with self._lock:
                        if len(self._failed) >= MAX_ADDRESSES:
                            self._failed.clear()
                        self._failed[address] = (self.clock(), caught)
                self._metrics.counter("channel.connect_failed").inc()
                self._log.warn("peer_not_reached", address=address, reason=repr(str(caught)))
                raise
            self._failed.pop(address, None)
            self._reached[address] = peer
            return peer

    def send(self, peer: str, message: Message) -> bool:
        """Whether ``message`` is on its way."""
        try:
            status = self.channel.notify(peer, encode(message))
        except BackendClosed:
            status = Status.FAILED
        if status is not Status.OK:
            self._metrics.counter("channel.not_sent").inc()
        if status is Status.FAILED:
            # It may have gone before `reach` knew it.
            self._forget(peer)
        return status is Status.OK

    def call(self, peer: str, make: Callable[[int], Message], deadline_s: float) -> Have | Lent:
        """Send what ``make`` gives for a fresh number, and wait for the answer to it.

        Raises:
            BackendUnavailable: it could not be sent, or the peer is lost.
            TimeoutError: no answer before the deadline.
        """
        ask = next(self._asks)
        answer = self._answers[ask] = _Answer(peer)
        try:
            if not self.send(peer, make(ask)):
                raise BackendUnavailable(f"{peer} is gone", op="call")
            if not answer.came.wait(max(0.0, deadline_s - self.clock())):
                raise TimeoutError
            if answer.message is None:
                raise BackendUnavailable(f"{peer} is gone", op="call")
            return answer.message
        finally:
            self._answers.pop(ask, None)

    def close(self) -> None:
        """End every connection."""
        self.channel.close()

    def _notified(self, peer: str, data: bytes) -> None:
        try:
            message = decode(data)
        except msgspec.DecodeError as error:
            self._metrics.counter("channel.not_understood").inc()
            self._log.warn("message_not_understood", peer=peer, reason=repr(str(error)))
            return
        if isinstance(message, (Have, Lent)):
            answer = self._answers.get(message.ask)
            if answer is not None and answer.peer == peer:
                answer.message = message
                answer.came.set()
            return
        handler = self._handlers.get(type(message))
        if handler is None:
            self._metrics.counter("channel.not_wanted").inc()
            return
        handler(peer, message)

    def _lost(self, peer: str, why: str) -> None:
        self._metrics.counter("channel.lost").inc()
        self._log.warn("peer_lost", peer=peer, reason=repr(why))
        self._forget(peer)
        for answer in list(self._answers.values()):
            if answer.peer == peer:
                answer.came.set()
        for handler in self._on_lost:
            handler(peer)

    def _forget(self, peer: str) -> None:
        with self._lock:
            for address in [a for a, name in self._reached.items() if name == peer]:
                del self._reached[address]


class _Answer:
    """One that is waited for."""

    __slots__ = ("came", "message", "peer")

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.came = threading.Event()
        self.message: Have | Lent | None = None
