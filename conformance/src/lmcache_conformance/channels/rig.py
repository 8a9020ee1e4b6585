"""What a channel is judged with: sides in this process, peers in others, and their clean-up."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import NamedTuple

import numpy as np

from lmcache_conformance.channels.peer import Peer
from lmcache_conformance.channels.sides import MIB, Side, Source
from lmcache_core.sdk import CLOSE_LIMIT_S, ChannelCapabilities, ChannelPlugin

CLOSE_SLACK_S = 0.5


class Pair(NamedTuple):
    """Two connected sides: ``a`` reached ``b``, and calls it ``b_name``."""

    a: Side
    b: Side
    b_name: str
    a_name: str


class ChannelRig:
    """One check's hold on a channel.  What it opens is closed when the check ends.

    Attributes:
        quick: the short form of the long checks.
        seed: of everything random.
        secret: the token of every side, unless told otherwise.
        figures: measured here, shown in the certificate.
    """

    def __init__(self, source: Source, *, seed: int, quick: bool = False) -> None:
        self.source = source
        self.quick = quick
        self.seed = seed
        self.secret = secrets.token_bytes(32)
        self.figures: dict[str, float] = {}
        self.rng = np.random.default_rng(seed)
        self._sides: list[Side] = []
        self._peers: list[Peer] = []
        self._numbers = itertools.count(1)

    @property
    def plugin(self) -> ChannelPlugin:
        """Of the channel."""
        return self.source.loaded()

    def open(
        self,
        nbytes: int = 4 * MIB,
        *,
        secret: bytes | None = None,
        options: dict[str, str] | None = None,
    ) -> Side:
        """A side in this process, with memory that is filled."""
        made = Side(
            self.source, secret=self.secret if secret is None else secret, nbytes=nbytes,
            options=options,
        )  # fmt: skip
        made.arena.fill(next(self._numbers))
        self._sides.append(made)
        return made

    def join(self, a: Side, b: Side) -> Pair:
        """Let ``a`` reach ``b``; both know each other then."""
        b_name = a.connect(b)
        return Pair(a, b, b_name, self.introduce(a, b_name, b))

    def introduce(self, a: Side, b_name: str, b: Side) -> str:
        """What ``b`` calls ``a``, which reached it."""
        message = f"introduction {next(self._numbers)}".encode()
        a.channel.notify(b_name, message)
        return b.has(message)

    def pair(self, nbytes: int = 4 * MIB) -> Pair:
        """Two new sides, connected."""
        return self.join(self.open(nbytes), self.open(nbytes))

    def claims(self) -> ChannelCapabilities:
        """What the channel claims."""
        side = self._sides[0] if self._sides else self.open()
        return side.channel.capabilities

    def peer(self, nbytes: int = 4 * MIB) -> Peer:
        """A side in a process of its own."""
        made = Peer(self.source, secret=self.secret, nbytes=nbytes)
        self._peers.append(made)
        return made

    def reach(self, side: Side, peer: Peer) -> tuple[str, str]:
        """``side`` connects to ``peer``: what it calls it, and what it is called there."""
        name = side.connect(peer.metadata)
        message = f"introduction {next(self._numbers)}"
        side.channel.notify(name, message.encode())
        return name, peer.call("has", message=message)["peer"]

    def reached(self, side: Side, peer: Peer) -> tuple[str, str]:
        """``peer`` connects to ``side``; the names as of `reach`."""
        there = peer.call("connect", metadata=side.channel.metadata().hex())["peer"]
        message = f"introduction {next(self._numbers)}"
        peer.call("notify", peer=there, message=message)
        return side.has(message.encode()), there

    def close(self, side: Side) -> float:
        """Close it; the seconds that it took."""
        if side in self._sides:
            self._sides.remove(side)
        started_s = time.monotonic()
        side.channel.close()
        return time.monotonic() - started_s

    def finish(self) -> list[str]:
        """Close everything; what went wrong with that."""
        wrong = []
        for peer in self._peers:
            peer.close()
        for side in list(self._sides):
            try:
                seconds = self.close(side)
            except Exception as error:  # reported as the check's answer
                wrong.append(f"close() raised {error!r}")
                continue
            if seconds > CLOSE_LIMIT_S + CLOSE_SLACK_S:
                wrong.append(f"close() took {seconds:.1f} s, allowed are {CLOSE_LIMIT_S:.0f} s")
        return wrong
