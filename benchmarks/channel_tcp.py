"""tcp:// beside a bare loop over one socket: two processes of one host, the same memory and sizes.

python benchmarks/channel_tcp.py [--out build/bench.json] [--rounds 15]

The bare loop sends a whole piece and waits for a byte of answer, or asks with a byte and receives
a whole piece: what a transfer needs at least, without a grant, a deadline or a second thread.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import mmap
import multiprocessing as mp
import secrets
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from figures import Figure, interleave, save, show, throughput

from lmcache_core.channels.tcp import plugin
from lmcache_core.sdk import (
    Access,
    Buffer,
    ChannelHost,
    MemoryKind,
    OpContext,
    Piece,
    Region,
    Status,
)

MIB = 1 << 20
ARENA_BYTES = 32 * MIB
SIZES = (("1MiB", MIB, 64), ("32MiB", 32 * MIB, 4))
"""Name, bytes of a transfer, transfers in a round."""
METHOD = "over a bare loop of blocking sockets, one transfer after the other, loopback"
TARGET = 0.85


class _Nothing:
    def inc(self, amount: int = 1) -> None: ...


class Side:
    """A channel over one arena."""

    def __init__(
        self, token: bytes, told: Callable[[str, bytes], None] = lambda p, m: None
    ) -> None:
        self.memory = mmap.mmap(-1, ARENA_BYTES)
        self.memory[:] = secrets.token_bytes(MIB) * (ARENA_BYTES // MIB)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        host = ChannelHost(
            logger=logging.getLogger("bench"),
            counter=lambda name: _Nothing(),
            secret=token,
            notified=told,
        )
        self.channel = plugin.open("tcp://127.0.0.1:0", {"max_peers": 4}, host)
        self.region = Region(1, self.address, ARENA_BYTES, MemoryKind.HOST)
        self.channel.register(self.region)
        self.view = memoryview(self.memory)

    def buffer(self, nbytes: int) -> Buffer:
        return Buffer(self.view[:nbytes], self.address, nbytes, region=self.region)


def receive(sock: socket.socket, view: memoryview) -> None:
    while view:
        view = view[sock.recv_into(view) :]


def target(pipe: Connection, token: bytes) -> None:
    """The other process: grants all of its memory, and answers the bare loop."""
    known: list[str] = []
    came = threading.Event()
    side = Side(token, lambda peer, message: (known.append(peer), came.set()))
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send((side.channel.metadata(), server.getsockname()[1]))
    came.wait(10)
    whole = [side.buffer(ARENA_BYTES)]
    tickets = [
        side.channel.grant(known[0], whole, access=access, lease_s=3600).ticket
        for access in (Access.WRITE, Access.READ)
    ]
    sock, _ = server.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pipe.send(tickets)
    while order := sock.recv(9):
        nbytes = int.from_bytes(order[1:], "little")
        if order[:1] == b"w":
            receive(sock, side.view[:nbytes])
            sock.sendall(b"k")
        else:
            sock.sendall(side.view[:nbytes])
    side.channel.close()


def figures_of(rounds: int) -> list[Figure]:
    token = secrets.token_bytes(32)
    pipe, other = mp.Pipe()
    process = mp.get_context("spawn").Process(target=target, args=(other, token), daemon=True)
    process.start()
    metadata, port = pipe.recv()
    side = Side(token)
    peer = side.channel.connect(metadata, OpContext(deadline_s=time.monotonic() + 10))
    side.channel.notify(peer, b"here I am")
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tickets = dict(zip(("write", "read"), pipe.recv()))
    figures = []
    for label, nbytes, count in SIZES:
        for op in ("write", "read"):
            start = getattr(side.channel, op)
            piece = [Piece(side.buffer(nbytes), 0)]
            order = op[:1].encode() + nbytes.to_bytes(8, "little")
            view = side.view[:nbytes]

            def ours() -> None:
                for _ in range(count):
                    ctx = OpContext(deadline_s=time.monotonic() + 30)
                    number = start(peer, tickets[op], piece, ctx)
                    assert side.channel.wait(number, 30) == [Status.OK]

            def bare() -> None:
                for _ in range(count):
                    sock.sendall(order)
                    if op == "write":
                        sock.sendall(view)
                        assert sock.recv(1) == b"k"
                    else:
                        receive(sock, view)

            def deep() -> None:
                ctx = OpContext(deadline_s=time.monotonic() + 30)
                numbers = [start(peer, tickets[op], piece, ctx) for _ in range(count)]
                for number in numbers:
                    assert side.channel.wait(number, 30) == [Status.OK]

            for run in (ours, bare, deep):
                run()
            times = interleave({"ours": ours, "raw": bare, "deep": deep}, rounds)
            name = f"channel_tcp.{op}_{label}"
            figures.append(
                throughput(
                    name,
                    nbytes * count,
                    times,
                    TARGET,
                    f"{op} {METHOD}",
                    deep="all started at once",
                )
            )
    sock.close()
    side.channel.close()
    process.join(10)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    save(figures_of(args.rounds), args.out)
    show(args.out)


if __name__ == "__main__":
    main()
