"""``nixl+obj://bucket``: an object a value, moved by NIXL's S3 plugin through memory of our own.

S3 replaces an object as a whole, so a reader gets the bytes of one put; the header proves it.  The
library does not say why a transfer failed: after a failure the service is asked first whether it is
there at all.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence

from lmcache_backend_nixl.batches import BatchConnector, Finish
from lmcache_backend_nixl.bucket import Bucket
from lmcache_backend_nixl.frame import HEADER_BYTES, NotWhole, payload_in, seal, size_in
from lmcache_backend_nixl.library import Agent, Piece, TransferFailed
from lmcache_core.sdk import (
    Buffer,
    Capabilities,
    Durability,
    GetResult,
    Health,
    HostServices,
    OpContext,
    ScanEntry,
    Sharing,
    Status,
)

STAGED_BYTES = 32 << 20
"""A batch moves at most so much at once, or one value when that is larger."""
KEPT_BYTES = 64 << 20
"""A lane keeps its memory for the next call, up to this size."""


class ObjLane:
    """An agent, and memory that only it touches."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def staging(self, sizes: Sequence[int]) -> list[memoryview]:
        """Memory of these sizes; what was in it before is gone."""
        nbytes = sum(sizes)
        memory = self._memory
        if len(memory) < nbytes:
            memory = mmap.mmap(-1, nbytes)
            if nbytes <= KEPT_BYTES:
                self._memory = memory
        elif nbytes:
            ctypes.memset(_address(memory), 0, nbytes)
        view, starts = memoryview(memory), itertools.accumulate(sizes, initial=0)
        return [view[start : start + size] for start, size in zip(starts, sizes)]

    def close(self) -> None:
        """Give back the agent; the memory goes with its last view."""
        self.agent.close()


class ObjConnector(BatchConnector[ObjLane]):
    """Thread-safe up to ``lanes`` calls.

    Args:
        bucket: closed with the connector.
        make: a new agent.
        lanes: calls at the same time.
        max_value_bytes: of one value.
        host: services of core.
    """

    def __init__(
        self,
        bucket: Bucket,
        make: Callable[[], Agent],
        *,
        lanes: int,
        max_value_bytes: int,
        host: HostServices,
    ) -> None:
        super().__init__(lambda: ObjLane(make()), lanes=lanes, host=host, bounced=True)
        self._bucket = bucket
        self._suspect = False
        self._failed = host.counter("nixl.failed_transfers")
        self.capabilities = capabilities(lanes=lanes, max_value_bytes=max_value_bytes)

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")

        def work(lane: ObjLane) -> list[Status]:
            try:
                return [Status.OK if there else Status.MISS for there in self._present(lane, keys)]
            except TransferFailed:
                return [Status.FAILED] * len(keys)

        return self._run(work, len(keys), Status.TIMED_OUT, Status.TIMED_OUT, (), ctx)

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")

        def work(lane: ObjLane) -> list[Status]:
            gone = self._bucket.delete(keys)
            return [Status.OK if each else Status.FAILED for each in gone]

        return self._run(work, len(keys), Status.TIMED_OUT, Status.TIMED_OUT, (), ctx)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``."""
        self.check_call((), "scan")
        for entry in self._bucket.scan(prefix):
            if ctx.remaining_s(self._clock()) <= 0:
                raise TimeoutError("the scan took longer than its deadline")
            yield entry

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")

        def work(lane: ObjLane) -> Health:
            self._bucket.check()
            self._suspect = False
            return Health(ok=True)

        return self._look(work, ctx)

    def close_resources(self) -> None:
        super().close_resources()
        self._bucket.close()

    def _read(
        self, lane: ObjLane, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> Finish:
        usable = [self.usable_view(target) is not None for target in targets]
        statuses = [Status.TIMED_OUT if fit else Status.REJECTED for fit in usable]
        wanted = [index for index, fit in enumerate(usable) if fit]
        # A value is never longer than that, whatever the target's size.
        limit = self.capabilities.max_value_bytes
        sizes = [HEADER_BYTES + min(target.nbytes, limit) for target in targets]
        frames = dict(zip(wanted, lane.staging([sizes[index] for index in wanted])))
        for part in _parts(wanted, sizes):
            if ctx.remaining_s(self._clock()) <= 0:
                break
            names, into = [keys[i] for i in part], [frames[i] for i in part]
            moved = self._move(lane, "READ", names, into, ctx)
            for index, status in zip(part, moved):
                statuses[index] = status

        def finish() -> list[GetResult]:
            return [
                _deliver(frames[index], targets[index])
                if status is Status.OK
                else GetResult(status)
                for index, status in enumerate(statuses)
            ]

        return finish

    def _write(
        self, lane: ObjLane, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        statuses = [Status.TIMED_OUT] * len(keys)
        wanted: list[int] = []
        for index, source in enumerate(sources):
            fits = source.nbytes <= self.capabilities.max_value_bytes
            if self.usable_view(source) is not None and fits:
                wanted.append(index)
            else:
                statuses[index] = Status.REJECTED
        sizes = [HEADER_BYTES + source.nbytes for source in sources]
        for part in _parts(wanted, sizes):
            if ctx.remaining_s(self._clock()) <= 0:
                break
            frames = lane.staging([sizes[index] for index in part])
            for index, frame in zip(part, frames):
                view = sources[index].view
                assert view is not None
                frame[HEADER_BYTES:] = view
                seal(frame, len(view))
            moved = self._move(lane, "WRITE", [keys[index] for index in part], frames, ctx)
            for index, status in zip(part, moved):
                statuses[index] = status
        return statuses

    def _move(
        self,
        lane: ObjLane,
        op: str,
        keys: Sequence[bytes],
        frames: Sequence[memoryview],
        ctx: OpContext,
    ) -> list[Status]:
        """All at once; where that fails, those that are there one by one."""
        try:
            self._transfer(lane, op, keys, frames)
        except TransferFailed:
            self._failed.inc()
            self._suspect = True
        else:
            return [Status.OK] * len(keys)
        there = [True] * len(keys)
        if op == "READ":
            try:
                there = self._present(lane, keys)
            except TransferFailed:
                return [Status.FAILED] * len(keys)
        statuses: list[Status] = []
        for key, frame, present in zip(keys, frames, there):
            if not present:
                statuses.append(Status.MISS)
            elif ctx.remaining_s(self._clock()) <= 0:
                statuses.append(Status.TIMED_OUT)
            else:
                try:
                    self._transfer(lane, op, [key], [frame])
                except TransferFailed:
                    self._suspect = True
                    statuses.append(Status.FAILED)
                else:
                    statuses.append(Status.OK)
        return statuses

    def _transfer(
        self, lane: ObjLane, op: str, keys: Sequence[bytes], frames: Sequence[memoryview]
    ) -> None:
        self._ask_if_suspect()
        pieces = [
            Piece(
                _address(frame), len(frame), number,
                name=self._bucket.object_of(key),
            )
            for number, (key, frame) in enumerate(zip(keys, frames))
        ]  # fmt: skip
        lane.agent.move(op, pieces, self._clock)

    def _present(self, lane: ObjLane, keys: Sequence[bytes]) -> list[bool]:
        self._ask_if_suspect()
        try:
            return lane.agent.present([self._bucket.object_of(key) for key in keys])
        except TransferFailed:
            self._suspect = True
            raise

    def _ask_if_suspect(self) -> None:
        """After a failure: is anybody there?

        Raises:
            BackendUnavailable: no.
        """
        if self._suspect:
            self._bucket.check()
            self._suspect = False

    def was_late(self) -> None:
        self._suspect = True


def capabilities(*, lanes: int, max_value_bytes: int) -> Capabilities:
    """What a connector with these settings claims."""
    return Capabilities(
        max_concurrency=lanes,
        max_batch=128,
        max_value_bytes=max_value_bytes,
        scan=True,
        submit=True,
        checksums=True,
        # A bucket may have rules that expire objects.
        evicts=True,
        durability=Durability.PROCESS,
        sharing=Sharing.CLUSTER,
    )


def _deliver(frame: memoryview, target: Buffer) -> GetResult:
    """Copy a verified value to its target."""
    assert target.view is not None
    try:
        nbytes = size_in(frame)
        if nbytes > target.nbytes:
            return GetResult(Status.SIZE_MISMATCH, nbytes)
        target.view[:nbytes] = payload_in(frame)
    except NotWhole:
        return GetResult(Status.CORRUPT)
    return GetResult(Status.OK, nbytes)


def _parts(wanted: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """``wanted`` in parts of at most `STAGED_BYTES`, or of one."""
    part: list[int] = []
    for index in wanted:
        if part and sum(sizes[i] for i in part) + sizes[index] > STAGED_BYTES:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
