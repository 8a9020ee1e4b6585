"""The built-in channel: connections that come while it closes, or that leave at once."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lmcache_core.channels.tcp import TcpChannel
from lmcache_core.metrics import Metrics
from lmcache_core.sdk import (
    BackendClosed,
    BackendUnavailable,
    ChannelHost,
    Endpoint,
    OpContext,
)

HERE = Endpoint("tcp", "127.0.0.1", 0)


class Rig:
    """A channel, and what its threads did not catch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.metrics = Metrics()
        self.uncaught: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", self.uncaught.append)
        self.live: list[TcpChannel] = []

    def open(self) -> TcpChannel:
        host = ChannelHost(
            logger=logging.getLogger("test"), counter=self.metrics.counter, secret=b"secret" * 6
        )
        self.live.append(TcpChannel(HERE, host))
        return self.live[-1]

    def handshakes_end(self) -> None:
        end_s = time.monotonic() + 5
        while any(thread.name == "channel-handshake" for thread in threading.enumerate()):
            assert time.monotonic() < end_s
            time.sleep(0.005)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    for channel in made.live:
        channel.close()


def within(seconds: float = 5.0) -> OpContext:
    return OpContext(deadline_s=time.monotonic() + seconds)


def test_a_peer_that_comes_while_the_channel_closes_is_counted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = rig.open(), rig.open()
    peers, join = ours._peers, ours._peers._join

    def closes_meanwhile(*arguments: Any) -> Any:
        peers._closed = True
        return join(*arguments)

    monkeypatch.setattr(peers, "_join", closes_meanwhile)
    theirs.connect(ours.metadata(), within())
    rig.handshakes_end()
    assert rig.uncaught == []
    assert rig.metrics.snapshot()["refused.handshake"] == 1
    assert not peers._peers


def test_a_peer_that_leaves_at_once_is_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = rig.open(), rig.open()
    join = ours._peers._join

    def left(sock: socket.socket, *arguments: Any) -> Any:
        sock.close()
        return join(sock, *arguments)

    monkeypatch.setattr(ours._peers, "_join", left)
    theirs.connect(ours.metadata(), within())
    rig.handshakes_end()
    assert rig.uncaught == [] and rig.metrics.snapshot()["refused.handshake"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(theirs._peers, "_join", left)
        with pytest.raises((BackendUnavailable, BackendClosed)):
            theirs.connect(ours.metadata(), within())
