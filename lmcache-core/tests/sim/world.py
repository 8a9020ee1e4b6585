"""A single-thread world under an engine: its clock, its executors, a disk that crashes.

One seed decides everything: which job runs next, when time passes, where a crash falls.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.envelope import HEADER_BYTES
from lmcache_core.sdk import (
    BackendUnavailable,
    Buffer,
    Capabilities,
    FileEntry,
    GetResult,
    Health,
    OpContext,
    Sharing,
    Status,
)
from lmcache_core.transfer.executor import Completions, Lane


class Crash(BaseException):
    """The machine or the process stops here."""


class SimRuntime:
    """Clock, executors and waiting of one seeded run."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.completions = Completions()
        self.time_s = 1000.0
        self.executors: list[SimExecutor] = []
        self._timers: list[list] = []

    def now_s(self) -> float:
        return self.time_s

    def executor(self, name: str, *, threads: int, max_queued: int) -> SimExecutor:
        made = SimExecutor(max_queued)
        self.executors.append(made)
        return made

    def every(self, interval_s: float, fire: Callable[[], bool]) -> None:
        self._timers.append([self.time_s + interval_s, interval_s, fire])

    def wait(self, timeout_s: float) -> None:
        for timer in list(self._timers):
            if self.time_s >= timer[0]:
                timer[0] = self.time_s + timer[1]
                if not timer[2]():
                    self._timers.remove(timer)
        if not self.run_one():
            self.time_s += timeout_s
        self.time_s += 0.0001

    def bounded(self, job: Callable[[], None], limit_s: float) -> bool:
        job()
        return True

    def run_one(self) -> bool:
        """Run one job of an executor that is not stalled."""
        ready = [e for e in self.executors if e.has_work and not e.stalled]
        if not ready:
            return False
        self.rng.choice(ready).run_one(self.rng)
        return True


class SimExecutor:
    """Queues like a `ThreadExecutor`; jobs of one lane run in any order."""

    def __init__(self, max_queued: int) -> None:
        self._lanes: dict[Lane, list[Callable[[], None]]] = {Lane.LOAD: [], Lane.STORE: []}
        self._max_queued = max_queued
        self._closed = False
        self.stalled = False

    @property
    def has_work(self) -> bool:
        return any(self._lanes.values())

    def submit(self, job: Callable[[], None], lane: Lane) -> bool:
        if self._closed or len(self._lanes[lane]) >= self._max_queued:
            return False
        self._lanes[lane].append(job)
        return True

    def run_one(self, rng: random.Random) -> None:
        lane = self._lanes[Lane.LOAD] or self._lanes[Lane.STORE]
        lane.pop(rng.randrange(len(lane)))()

    def close(self, timeout_s: float) -> bool:
        self._closed = True
        for lane in self._lanes.values():
            lane.clear()
        return not self.stalled


class SimRemote(MemoryConnector):
    """A shared store that outlives the engine, forgets, fails, and gives bytes that rotted.

    A put of ours may have been carried out or not when it fails.

    Args:
        clock: of deadlines: the simulation's.
    """

    capabilities = Capabilities(max_concurrency=8, evicts=True, sharing=Sharing.CLUSTER)

    def __init__(self, rng: random.Random, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self.rng = rng
        self.trouble = 0.0

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self._fail()
        answers = super().exists(keys, ctx)
        return [self._instead(Status.TIMED_OUT, answer) for answer in answers]

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self._fail()
        if self.rng.random() < self.trouble:
            self._values.pop(keys[0], None)
        results = super().get_into(keys, targets, ctx)
        if results[0].status is Status.OK and self.rng.random() < self.trouble:
            view = targets[0].view
            assert view is not None
            at = self.rng.randrange(HEADER_BYTES + 3000)
            view[at] ^= 1 << self.rng.randrange(8)
        return [GetResult(self._instead(Status.FAILED, r.status), r.nbytes) for r in results]

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        if self.rng.random() < self.trouble / 2:
            self._fail()
        answers = super().put_from(keys, sources, ctx)
        self._fail()
        return [self._instead(Status.TIMED_OUT, answer) for answer in answers]

    def health(self, ctx: OpContext) -> Health:
        self._fail()
        return Health(ok=True)

    def close(self) -> None:
        """The next engine goes on with it."""

    def _fail(self) -> None:
        if self.rng.random() < self.trouble:
            raise BackendUnavailable("trouble")

    def _instead(self, other: Status, answer: Status) -> Status:
        return other if self.rng.random() < self.trouble / 4 else answer


@dataclass
class Inode:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    mtime_s: float = 0.0


class SimDisk:
    """Files in memory with a page cache: what was not synced may be lost or torn.

    ``fault`` is asked before every primitive and may raise OSError or `Crash`.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dirs: set[str] = {"/"}
        self.names: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self._open: dict[int, Inode] = {}
        self._next_fd = 100
        self.clock = 0.0
        self.fault: Callable[[str], None] = lambda op: None
        self.peak_bytes = 0

    def used_bytes(self) -> int:
        return sum(len(inode.data) for inode in self.names.values())

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self.fault("open")
        inode = self.names.get(path)
        if inode is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            inode = self.names[path] = Inode()
        elif flags & os.O_EXCL and flags & os.O_CREAT:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self._next_fd += 1
        self._open[self._next_fd] = inode
        return self._next_fd

    def pread_into(self, fd: int, view: memoryview, offset: int) -> int:
        self.fault("pread")
        part = self._open[fd].data[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        self.fault("pwrite")
        count = len(view) if self.rng.random() < 0.7 else self.rng.randint(1, len(view))
        inode = self._open[fd]
        if len(inode.data) < offset:
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + count] = view[:count]
        self._tick(inode)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes())
        return count

    def fsync(self, fd: int) -> None:
        self.fault("fsync")
        self._open[fd].synced = bytes(self._open[fd].data)

    def fsync_dir(self, path: str) -> None:
        self.fault("fsync_dir")
        inside = path.rstrip("/") + "/"
        for name in [n for n in self.durable_names if n.startswith(inside)]:
            del self.durable_names[name]
        for name, inode in self.names.items():
            if name.startswith(inside):
                self.durable_names[name] = inode

    def fd_size(self, fd: int) -> int:
        return len(self._open[fd].data)

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)

    def rename(self, src: str, dst: str) -> None:
        self.fault("rename")
        self.names[dst] = self.names.pop(src)

    def unlink(self, path: str) -> None:
        self.fault("unlink")
        if self.names.pop(path, None) is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)

    def makedirs(self, path: str, mode: int = 0o700) -> None:
        self.fault("makedirs")
        parts = path.strip("/").split("/")
        for i in range(len(parts)):
            self.dirs.add("/" + "/".join(parts[: i + 1]))

    def exists(self, path: str) -> bool:
        self.fault("exists")
        return path in self.names or path in self.dirs

    def size(self, path: str) -> int:
        self.fault("size")
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return len(self.names[path].data)

    def utime(self, path: str) -> None:
        if path in self.names:
            self._tick(self.names[path])

    def scan(self, path: str) -> Iterator[FileEntry]:
        self.fault("scan")
        inside = path.rstrip("/") + "/"
        for name in sorted(self.dirs):
            rest = name[len(inside) :]
            if name.startswith(inside) and rest and "/" not in rest:
                yield FileEntry(name=rest, is_dir=True, nbytes=0, mtime_s=0.0)
        for name, inode in sorted(self.names.items()):
            rest = name[len(inside) :]
            if name.startswith(inside) and "/" not in rest:
                yield FileEntry(rest, False, len(inode.data), inode.mtime_s)

    def crash_after(self, count: int) -> None:
        """Have everything end at the next primitive but so many."""
        left = count

        def fault(op: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        self.fault = fault

    def crash(self, *, power: bool) -> None:
        """The process dies; with ``power`` unsynced names and bytes may be lost too."""
        self._open.clear()
        self.fault = lambda op: None
        if not power:
            return
        survived: dict[str, Inode] = {}
        for name in sorted(self.names.keys() | self.durable_names.keys()):
            new, old = self.names.get(name), self.durable_names.get(name)
            inode = new if new is old or self.rng.random() < 0.5 else old
            if inode is not None:
                survived[name] = inode
        for inode in {id(i): i for i in survived.values()}.values():
            if bytes(inode.data) != inode.synced and self.rng.random() < 0.7:
                self._tear(inode)
        self.names = survived
        self.durable_names = dict(survived)

    def _tear(self, inode: Inode) -> None:
        cut = self.rng.randrange(len(inode.data) + 1)
        if self.rng.random() < 0.5:
            del inode.data[cut:]
        else:
            inode.data[cut:] = bytes(len(inode.data) - cut)

    def _tick(self, inode: Inode) -> None:
        self.clock += 1.0
        inode.mtime_s = self.clock
