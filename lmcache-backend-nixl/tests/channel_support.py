"""A channel in this process, and one in a process of its own that does what it is told."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from lmcache_backend_nixl.channel_plugin import OPTIONS, plugin
from lmcache_core.sdk import (
    Access,
    Buffer,
    ChannelHost,
    MemoryKind,
    OpContext,
    Piece,
    Region,
    ReleaseToken,
    Status,
)

MIB = 1 << 20
TOKEN = b"0123456789abcdef0123456789abcdef"
ANSWER_S = 30.0


class Counts:
    """A counter that nobody reads."""

    def inc(self, amount: int = 1) -> None: ...


class Arena:
    """Memory of its own, as one region; buffers have their offset as token."""

    def __init__(self, nbytes: int, region_id: int = 1, fill: int = 0) -> None:
        self.map = mmap.mmap(-1, nbytes)
        self.view = memoryview(self.map)
        if fill:
            self.view[:] = bytes([fill]) * nbytes
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.region = Region(region_id, address, nbytes, MemoryKind.HOST)

    def buffer(self, offset: int, nbytes: int) -> Buffer:
        return Buffer(
            self.view[offset : offset + nbytes],
            self.region.address + offset,
            nbytes,
            region=self.region,
            token=ReleaseToken(offset + 1),
        )


class Side:
    """An open channel with an arena, and everything that it told its host."""

    def __init__(self, nbytes: int = 16 * MIB, token: bytes = TOKEN, **options: Any) -> None:
        self.arena = Arena(nbytes)
        self.released: list[int] = []
        self.notes: list[tuple[str, bytes]] = []
        self.losses: list[tuple[str, str]] = []
        self.seen: list[bytes] = []
        self.look = (0, 0)
        self.host = ChannelHost(
            logger=logging.getLogger("nixl-test"),
            counter=lambda name: Counts(),
            secret=token,
            released=self.released.append,
            notified=self._notified,
            lost=lambda peer, why: self.losses.append((peer, why)),
        )
        chosen = {spec.name: spec.default for spec in OPTIONS} | options
        self.channel = plugin.open("nixl+ucx://127.0.0.1", chosen, self.host)
        self.channel.register(self.arena.region)

    def _notified(self, peer: str, message: bytes) -> None:
        start, end = self.look
        self.seen.append(bytes(self.arena.view[start:end]))
        self.notes.append((peer, message))

    # What a process of its own is told to do; answers can be pickled.

    def metadata(self) -> bytes:
        return self.channel.metadata()

    def grant(
        self, peer: str, spans: list[tuple[int, int]], access: str, lease_s: float = 60.0
    ) -> Any:
        buffers = [self.arena.buffer(*span) for span in spans]
        return self.channel.grant(peer, buffers, access=Access(access), lease_s=lease_s)

    def revoke(self, grant: Any, seconds: float = 5.0) -> Status:
        return self.channel.revoke(grant, within(seconds))

    def connect(self, metadata: bytes, seconds: float = 10.0) -> str:
        return self.channel.connect(metadata, within(seconds))

    def fill(self, offset: int, data: bytes) -> None:
        self.arena.view[offset : offset + len(data)] = data

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.arena.view[offset : offset + nbytes])

    def watch(self, start: int, end: int) -> None:
        self.look = (start, end)

    def told(self) -> tuple[list[tuple[str, bytes]], list[bytes], list[Any], list[int]]:
        return self.notes, self.seen, self.losses, self.released

    def move(self, op: str, peer: str, ticket: bytes, pieces: list[Any], **more: Any) -> Any:
        """Whole: ``pieces`` are (local offset, bytes, span, offset in it)."""
        seconds = more.pop("seconds", 10.0)
        number = self.begin(op, peer, ticket, pieces, seconds=seconds, **more)
        return self.channel.wait(number, seconds + 5)

    def begin(
        self, op: str, peer: str, ticket: bytes, pieces: list[Any], *, seconds: float = 10.0,
        notification: bytes = b"",
    ) -> int:  # fmt: skip
        call = self.channel.write if op == "write" else self.channel.read
        made = [Piece(self.arena.buffer(at, n), span, off) for at, n, span, off in pieces]
        return call(peer, ticket, made, within(seconds), notification=notification)

    def notify(self, peer: str, message: bytes) -> Status:
        return self.channel.notify(peer, message)

    def poll(self, number: int) -> Any:
        return self.channel.poll(number)

    def wait(self, number: int, seconds: float) -> Any:
        return self.channel.wait(number, seconds)

    def cancel(self, number: int) -> None:
        self.channel.cancel(number)


class Far:
    """A `Side` in another process; methods run there."""

    def __init__(self, **options: Any) -> None:
        context = mp.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._line.send((name, args, kwargs))
                if not self._line.poll(ANSWER_S):
                    raise TimeoutError(f"{name} got no answer")
                good, answer = self._line.recv()
            if not good:
                raise answer
            return answer

        return call

    def freeze(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        end_s = time.monotonic() + 5
        while any(self._state(task) != "T" for task in os.listdir(self._tasks)):
            assert time.monotonic() < end_s  # each thread stops when it next can

    @property
    def _tasks(self) -> str:
        return f"/proc/{self.process.pid}/task"

    def _state(self, task: str) -> str:
        with open(f"{self._tasks}/{task}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]

    def thaw(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self._line.close()


def _serve(line: Connection, options: dict[str, Any]) -> None:
    environment = options.pop("environment", {})
    os.environ.update(environment)
    side = Side(**options)
    with contextlib.suppress(EOFError):
        while True:
            name, args, kwargs = line.recv()
            try:
                target = side.channel if name == "close" else side
                line.send((True, getattr(target, name)(*args, **kwargs)))
            except Exception as error:
                line.send((False, RuntimeError(repr(error))))


@contextlib.contextmanager
def far(**options: Any) -> Iterator[Far]:
    other = Far(**options)
    try:
        yield other
    finally:
        other.end()


@contextlib.contextmanager
def side(**options: Any) -> Iterator[Side]:
    made = Side(**options)
    try:
        yield made
    finally:
        made.channel.close()


def within(seconds: float) -> OpContext:
    return OpContext(deadline_s=time.monotonic() + seconds)
