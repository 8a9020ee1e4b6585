"""nixl+ucx:// beside the bare library: two processes on one host, the same memory and pieces.

python benchmarks/channel_nixl.py [--out build/bench.json] [--rounds 15]

All pay for a transfer of their own each time, descriptors and all.  `silent` figures have no
notification on either side.  The others have one of 32 bytes with each transfer: ours on its own
connection, while its target rests; the bare library's own needs a target that spins to take them,
which costs this host's other core, so both limits are shown.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import mmap
import multiprocessing as mp
import os
import secrets
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from figures import Figure, save, show, throughput

from lmcache_backend_nixl.channel_plugin import OPTIONS, plugin
from lmcache_backend_nixl.library import load
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
SHAPES = (("1MiB", 1, MIB, 40), ("32x1MiB", 32, MIB, 4), ("32MiB", 1, 32 * MIB, 4))
"""Name, pieces, bytes of each, transfers in a round."""
NOTIFICATION = b"n" * 32
DEADLINE_S = 30.0
METHOD = (
    "over the bare library: initialize_xfer, transfer, check_xfer_state, release; shared memory"
)


class _Nothing:
    def inc(self, amount: int = 1) -> None: ...


class Side:
    """A channel and a bare agent over one arena."""

    def __init__(self, token: bytes) -> None:
        self.map = mmap.mmap(-1, ARENA_BYTES)
        self.map.write(os.urandom(MIB) * (ARENA_BYTES // MIB))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.view = memoryview(self.map)
        self.region = Region(1, self.address, ARENA_BYTES, MemoryKind.HOST)
        self.told = threading.Event()
        self.by = ""
        host = ChannelHost(
            logger=logging.getLogger("bench"),
            counter=lambda name: _Nothing(),
            secret=token,
            notified=self._notified,
        )
        options = {spec.name: spec.default for spec in OPTIONS}
        self.channel = plugin.open("nixl+ucx://127.0.0.1", options, host)
        self.channel.register(self.region)
        api = load("UCX")
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = api.nixl_agent(secrets.token_hex(8), config)
        self.held = self.agent.register_memory(
            [(self.address, ARENA_BYTES, 0, "")], mem_type="DRAM"
        )

    def _notified(self, peer: str, message: bytes) -> None:
        self.by = peer
        self.told.set()

    def buffer(self, at: int, nbytes: int) -> Buffer:
        """Part of the arena."""
        return Buffer(self.view[at : at + nbytes], self.address + at, nbytes, region=self.region)


def owner(line: Connection, token: bytes) -> None:
    """The process that is written to and read from."""
    side = Side(token)
    line.send((side.channel.metadata(), side.agent.get_agent_metadata(), side.address))
    side.agent.add_remote_agent(line.recv())
    side.told.wait(DEADLINE_S)
    spinning = threading.Event()

    def spin() -> None:
        while True:
            spinning.wait()
            side.agent.get_new_notifs()
            time.sleep(0)

    threading.Thread(target=spin, daemon=True).start()
    while (order := line.recv()) is not None:
        if order == "spin":
            spinning.set()
        elif order == "rest":
            spinning.clear()
        else:
            access, spans = order
            buffers = [side.buffer(at, nbytes) for at, nbytes in spans]
            grant = side.channel.grant(side.by, buffers, access=access, lease_s=600)
            line.send(grant.ticket)
            continue
        line.send("done")


class Initiator:
    """This process, beside its owner."""

    def __init__(self) -> None:
        token = secrets.token_bytes(32)
        context = mp.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=owner, args=(theirs, token), daemon=True)
        self.process.start()
        self.side = Side(token)
        metadata, agent, self.far = self.line.recv()
        context_s = OpContext(deadline_s=time.monotonic() + DEADLINE_S)
        self.peer = self.side.channel.connect(metadata, context_s)
        self.bare_peer = self.side.agent.add_remote_agent(agent)
        self.line.send(self.side.agent.get_agent_metadata())
        self.side.channel.notify(self.peer, b"hello")

    def ask(self, order: Any) -> Any:
        """Have the owner do something."""
        self.line.send(order)
        return self.line.recv()

    def ours(
        self, op: str, rows: list[tuple[int, int]], ticket: bytes, notification: bytes
    ) -> Callable[[], None]:
        """One transfer through the channel."""
        call = getattr(self.side.channel, op)
        pieces = [
            Piece(self.side.buffer(at, nbytes), span) for span, (at, nbytes) in enumerate(rows)
        ]

        def run() -> None:
            context = OpContext(deadline_s=time.monotonic() + DEADLINE_S)
            number = call(self.peer, ticket, pieces, context, notification=notification)
            answers = self.side.channel.wait(number, DEADLINE_S)
            assert answers == [Status.OK] * len(pieces)

        return run

    def bare(self, op: str, rows: list[tuple[int, int]], notification: bytes) -> Callable[[], None]:
        """One transfer through the library."""
        agent, far, near = self.side.agent, self.far, self.side.address

        def run() -> None:
            here = agent.get_xfer_descs([(near + at, n, 0) for at, n in rows], mem_type="DRAM")
            there = agent.get_xfer_descs([(far + at, n, 0) for at, n in rows], mem_type="DRAM")
            handle = agent.initialize_xfer(op.upper(), here, there, self.bare_peer, notification)
            state = agent.transfer(handle)
            while state == "PROC":
                time.sleep(0)
                state = agent.check_xfer_state(handle)
            assert state == "DONE"
            agent.release_xfer_handle(handle)

        return run

    def times(self, op: str, shape: tuple[str, int, int, int], rounds: int) -> dict[str, Any]:
        """Seconds of one transfer in each round."""
        _, count, nbytes, turns = shape
        rows = [(at * nbytes, nbytes) for at in range(count)]
        ticket = self.ask((Access(op), rows))
        runs = {
            "ours": self.ours(op, rows, ticket, NOTIFICATION),
            "silent": self.ours(op, rows, ticket, b""),
            "bare silent": self.bare(op, rows, b""),
            "bare": self.bare(op, rows, NOTIFICATION),
        }
        names = list(runs)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name in names[number % 4 :] + names[: number % 4]:
                # Without its target's processor the library sets up no path.
                self.ask("spin" if name == "bare" or not number else "rest")
                start = time.perf_counter()
                for _ in range(turns):
                    runs[name]()
                if number:  # the first sets up paths
                    seconds[name].append((time.perf_counter() - start) / turns)
                if name == "bare":
                    # A flush waits for notifications to be taken; leave none to the next run.
                    runs["bare silent"]()
        self.ask("rest")
        return seconds

    def close(self) -> None:
        """End both."""
        self.side.channel.close()
        self.line.send(None)
        self.process.join(5)
        self.process.kill()


def figures_of(rounds: int) -> list[Figure]:
    """Write and read of each shape."""
    initiator = Initiator()
    figures = []
    try:
        for shape in SHAPES:
            name, count, nbytes, turns = shape
            for op in ("write", "read"):
                times = initiator.times(op, shape, rounds)
                what = (
                    f"{op} of {count} pieces of {nbytes >> 20} MiB, {turns} times a round, {METHOD}"
                )
                for suffix, ours, raw in (
                    ("", "ours", "bare"),
                    ("_silent", "silent", "bare silent"),
                ):
                    beside = {
                        "ours": times[ours],
                        "raw": times[raw],
                        "silent": times["bare silent"],
                    }
                    figures.append(
                        throughput(f"nixl_channel.{op}_{name}{suffix}", count * nbytes, beside, 0.90,
                                   what, silent="bare silent")
                    )  # fmt: skip
    finally:
        initiator.close()
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
