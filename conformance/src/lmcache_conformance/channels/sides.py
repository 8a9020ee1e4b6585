"""One side of a channel as a check sees it: its memory, and what the channel told core."""

from __future__ import annotations

import itertools
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from urllib.parse import parse_qsl, urlencode

import numpy as np

from lmcache_conformance.frame import Wrong
from lmcache_conformance.rig import Count
from lmcache_core.channels.registry import Channels
from lmcache_core.sdk import (
    CHANNEL_GROUP,
    Access,
    Buffer,
    ChannelHost,
    ChannelPlugin,
    Grant,
    MemoryKind,
    OpContext,
    Piece,
    Region,
    ReleaseToken,
    Status,
    TransferChannel,
)

MIB = 1 << 20
PATIENCE_S = 10.0
SLACK_S = 0.75
"""Past a deadline, on a machine that is busy."""
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the channel under judgement comes from; also told to the other process.

    Attributes:
        url: what is opened; without a port, so that every opening listens at its own.
        plugin: ``module:attribute`` of its `ChannelPlugin`; "" finds it by its entry point.
    """

    url: str
    plugin: str = ""

    def loaded(self) -> ChannelPlugin:
        """The plugin.

        Raises:
            ConfigError: nothing serves the URL.
        """
        return self._channels().plugin(self.url)

    def open(self, host: ChannelHost, options: dict[str, str] | None = None) -> TransferChannel:
        """A channel; ``options`` go over those of the URL."""
        bare, _, query = self.url.partition("?")
        merged = {**dict(parse_qsl(query, keep_blank_values=True)), **(options or {})}
        url = f"{bare}?{urlencode(merged)}" if merged else bare
        return self._channels().open(url, host)

    def _channels(self) -> Channels:
        if not self.plugin:
            return Channels()
        name = self.url.partition("://")[0]
        entry = metadata.EntryPoint(name=name, value=self.plugin, group=CHANNEL_GROUP)
        return Channels(lambda: [entry])


class Arena:
    """Registered memory whose every byte is known.

    Attributes:
        region: to register.
        array: its bytes.
    """

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes)
        self.array = np.frombuffer(self._map, np.uint8)
        address = int(self.array.ctypes.data)
        self.region = Region(next(_numbers), address, nbytes, MemoryKind.HOST)

    def fill(self, seed: int) -> None:
        """Every byte follows from ``seed``."""
        self.array[:] = pattern(seed, len(self.array))

    def buffer(self, offset: int, nbytes: int) -> Buffer:
        """A part of it, with a token of its own."""
        view = memoryview(self._map)[offset : offset + nbytes]
        token = ReleaseToken(next(_numbers))
        return Buffer(view, self.region.address + offset, nbytes, region=self.region, token=token)

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """A copy of a part."""
        return self.array[offset : offset + nbytes].tobytes()

    def changed(self, before: np.ndarray, but: Iterable[tuple[int, int]] = ()) -> str:
        """Where it is not ``before``, ranges of (offset, nbytes) in ``but`` left out; "" when
        nowhere."""
        at = 0
        for offset, nbytes in [*sorted(but), (len(self.array), 0)]:
            if offset > at and not np.array_equal(self.array[at:offset], before[at:offset]):
                first = at + int(np.argmax(self.array[at:offset] != before[at:offset]))
                return f"byte {first} of the memory was changed"
            at = max(at, offset + nbytes)
        return ""


def pattern(seed: int, nbytes: int) -> np.ndarray:
    """Bytes that follow from ``seed``, cheap to make; no two are equal at the same place often."""
    block = np.random.default_rng(seed).integers(0, 256, min(nbytes, 65_521), np.uint8)
    return np.resize(block, nbytes)


class Side:
    """A channel that is open, with an arena that is registered.

    Attributes:
        told: notifications, (peer, message).
        lost: (peer, why).
        released: tokens.
        texts: everything that it logged.
        watch: called at each notification, before it is kept.
    """

    def __init__(
        self, source: Source, *, secret: bytes, nbytes: int, options: dict[str, str] | None = None
    ) -> None:
        self.told: list[tuple[str, bytes]] = []
        self.lost: list[tuple[str, str]] = []
        self.released: list[ReleaseToken] = []
        self.texts: list[str] = []
        self.watch: Callable[[str, bytes], None] = lambda peer, message: None
        self.arena = Arena(nbytes)
        logger = logging.Logger(f"conformance.channel.{next(_numbers)}", logging.DEBUG)
        logger.addHandler(_Keep(self.texts))
        self.host = ChannelHost(
            logger=logger,
            counter=lambda name: Count(),
            secret=secret,
            released=self.released.append,
            notified=self._notified,
            lost=lambda peer, why: self.lost.append((peer, why)),
        )
        self.channel = source.open(self.host, options)
        self.channel.register(self.arena.region)

    def connect(self, other: Side | bytes, seconds: float = PATIENCE_S) -> str:
        """Reach ``other``, or whoever listens at such metadata."""
        where = other if isinstance(other, bytes) else other.channel.metadata()
        return self.channel.connect(where, within(seconds))

    def grant(
        self, peer: str, *parts: tuple[int, int], access: Access = Access.WRITE, lease_s: float = 60
    ) -> Grant:
        """Spans (offset, nbytes) of the arena."""
        spans = [self.arena.buffer(*part) for part in parts]
        return self.channel.grant(peer, spans, access=access, lease_s=lease_s)

    def start(
        self,
        peer: str,
        grant: Grant | bytes,
        pieces: Sequence[tuple[int, int, int, int]],
        *,
        reads: bool = False,
        notification: bytes = b"",
        seconds: float = PATIENCE_S,
    ) -> int:
        """Start a transfer of pieces (local offset, nbytes, span, offset in the span)."""
        ticket = grant if isinstance(grant, bytes) else grant.ticket
        call = self.channel.read if reads else self.channel.write
        made = [Piece(self.arena.buffer(at, size), span, to) for at, size, span, to in pieces]
        return call(peer, ticket, made, within(seconds), notification=notification)

    def answers(self, transfer: int, pieces: int, seconds: float = PATIENCE_S) -> list[Status]:
        """Of a started transfer.

        Raises:
            Wrong: there are none in time, or they are not one a piece.
        """
        found = self.channel.wait(transfer, seconds + SLACK_S)
        if found is None:
            raise Wrong(f"a transfer with {seconds:.1f} s has no answers {SLACK_S} s after that")
        if len(found) != pieces or not all(isinstance(each, Status) for each in found):
            raise Wrong(f"a transfer of {pieces} pieces was answered {found!r}")
        return found

    def move(
        self,
        peer: str,
        grant: Grant | bytes,
        pieces: Sequence[tuple[int, int, int, int]],
        *,
        reads: bool = False,
        notification: bytes = b"",
        seconds: float = PATIENCE_S,
    ) -> list[Status]:
        """`start`, then `answers`."""
        started = self.start(
            peer, grant, pieces, reads=reads, notification=notification, seconds=seconds
        )
        return self.answers(started, len(pieces), seconds)

    def must_move(self, peer: str, grant: Grant | bytes, *piece: int, reads: bool = False) -> None:
        """One piece, and it is OK."""
        local, nbytes, span, to = piece
        found = self.move(peer, grant, [(local, nbytes, span, to)], reads=reads)
        if found != [Status.OK]:
            raise Wrong(f"a {'read' if reads else 'write'} within a grant was {words(found)}")

    def has(self, message: bytes, seconds: float = PATIENCE_S) -> str:
        """Who sent ``message``.

        Raises:
            Wrong: it has not come in time.
        """
        if not until(lambda: any(found == message for _, found in list(self.told)), seconds):
            raise Wrong(f"the notification {message[:40]!r} has not come within {seconds:.0f} s")
        return next(peer for peer, found in self.told if found == message)

    def revoke(self, grant: Grant, seconds: float = 2.0) -> Status:
        """End ``grant``."""
        return self.channel.revoke(grant, within(seconds))

    def _notified(self, peer: str, message: bytes) -> None:
        self.watch(peer, message)
        self.told.append((peer, message))


class Stream:
    """Writes into a grant, one large transfer after the other, until one is not OK."""

    def __init__(
        self, side: Side, peer: str, ticket: bytes, nbytes: int, seconds: float = PATIENCE_S
    ) -> None:
        self._stop = threading.Event()
        self.last: list[Status] = []

        def run() -> None:
            while not self._stop.is_set():
                self.last = side.move(peer, ticket, [(0, nbytes, 0, 0)], seconds=seconds)
                if self.last != [Status.OK]:
                    return
                # The next pass is seen by what it changes.
                side.arena.array[:nbytes] += 1

        self._thread = threading.Thread(target=run, name="conformance-stream", daemon=True)
        self._thread.start()

    def must_end(self, seconds: float = PATIENCE_S) -> None:
        """Since its grant has ended, one of its writes is not OK."""
        self._thread.join(seconds + SLACK_S)
        if self._thread.is_alive():
            self._stop.set()
            raise Wrong("with a grant that has ended writes are still OK, or are not answered")


class _Keep(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(self.format(record))


def within(seconds: float) -> OpContext:
    """A context whose deadline is ``seconds`` from now."""
    return OpContext(deadline_s=time.monotonic() + seconds)


def until(holds: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    """Wait until it does; False when that takes longer."""
    end_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= end_s:
            return False
        time.sleep(0.002)
    return True


def words(answers: Sequence[Status]) -> str:
    """For a message."""
    return ", ".join(each.name for each in answers)
