"""`GdsConnector`: one file a value, in the layout of ``file://``; a `Mover` moves the bytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lmcache_backend_gds.direct import ALIGNMENT
from lmcache_backend_gds.lanes import Lanes
from lmcache_backend_gds.movers import Mover
from lmcache_backend_gds.regions import Regions
from lmcache_core.sdk import (
    AbandoningLoop,
    Buffer,
    Capabilities,
    Durability,
    GetResult,
    Health,
    MemoryKind,
    OpContext,
    Region,
    ReleaseToken,
    ScanEntry,
    Sharing,
    Status,
    TargetTooSmall,
    ValueFiles,
)

T = TypeVar("T")


class GdsConnector(AbandoningLoop):
    """Thread-safe, also between processes.

    A transfer can't be cancelled, neither a system call nor a kvikio future.  It runs on a worker,
    and a call that leaves at its deadline answers ABANDONED for the value in flight.

    Args:
        files: names and publication.
        mover: of the bytes.
        io: the mover's name, shown by `health`.
        capabilities: of `capabilities`.
        queue_depth: values of one call that move at the same time.
        regions: device memory to register; None where there is none.
        released, max_stuck, clock: see `AbandoningLoop`.
    """

    def __init__(
        self,
        files: ValueFiles,
        mover: Mover,
        *,
        io: str,
        capabilities: Capabilities,
        queue_depth: int = 1,
        regions: Regions | None = None,
        released: Callable[[ReleaseToken], None] | None = None,
        max_stuck: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("gds", released=released, clock=clock, max_stuck=max_stuck)
        self._files = files
        self._mover = mover
        self._io = io
        self._regions = regions
        self._lanes = Lanes(queue_depth)
        self.capabilities = capabilities

    def exists_one(self, key: bytes, timeout_s: float) -> bool:
        return self._files.exists(key)

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        get = super().get_into
        return self._split(
            targets, lambda part: get(keys[part], targets[part], ctx), GetResult(Status.FAILED)
        )

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        put = super().put_from
        return self._split(sources, lambda part: put(keys[part], sources[part], ctx), Status.FAILED)

    def get_buffer(self, key: bytes, target: Buffer, timeout_s: float) -> GetResult:
        if not self._takes(target):
            return GetResult(Status.REJECTED)
        nbytes = self._mover.read(self._files.path(key), target)
        if nbytes > target.nbytes:
            raise TargetTooSmall(nbytes)
        return GetResult(Status.OK, nbytes)

    def put_buffer(self, key: bytes, source: Buffer, timeout_s: float) -> Status:
        if not self._takes(source):
            return Status.REJECTED
        with self._files.publishing(key) as path:
            self._mover.write(path, source)
        return Status.OK

    def get_one(self, key: bytes, target: memoryview, timeout_s: float) -> int | None:
        """See `get_buffer`."""
        raise NotImplementedError("get_buffer takes device memory too")

    def put_one(self, key: bytes, source: memoryview, timeout_s: float) -> None:
        """See `put_buffer`."""
        raise NotImplementedError("put_buffer takes device memory too")

    def delete_one(self, key: bytes, timeout_s: float) -> None:
        self._files.delete(key)

    def scan(self, prefix: bytes, ctx: OpContext) -> Iterator[ScanEntry]:
        """Every value whose key starts with ``prefix``; foreign names are left out."""
        self.check_call((), "scan")
        return self._files.scan(prefix)

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        return dataclasses.replace(self._files.health(), details={"io": self._io})

    def register_region(self, region: Region) -> None:
        """Register device memory with cuFile; nothing to do for other memory."""
        if self._regions is not None:
            self._regions.add(region)

    def unregister_region(self, region: Region) -> None:
        """Undo `register_region`."""
        if self._regions is not None:
            self._regions.remove(region)

    def close_resources(self) -> None:
        self._lanes.close()
        if self._regions is not None:
            self._regions.close()

    def _split(
        self, buffers: Sequence[Buffer], move: Callable[[slice], list[T]], failed: T
    ) -> list[T]:
        """Move parts of a call at the same time; each ends by the deadline."""
        parts = self._lanes.slices(buffers)
        if len(parts) == 1:
            return move(parts[0])
        found = self._lanes.run([lambda part=part: move(part) for part in parts])  # type: ignore[misc]
        errors = [each for each in found if isinstance(each, Exception)]
        answers: list[T] = []
        for part, each in zip(parts, found):
            lost = [failed] * (part.stop - part.start)
            answers += lost if isinstance(each, Exception) else each
        # An exception gives every buffer back to core, so it can't tell of one that is not.
        if errors and not any(_abandoned(each) for each in answers):
            raise errors[0]
        return answers

    def _takes(self, buffer: Buffer) -> bool:
        if buffer.view is None and buffer.memory not in self.capabilities.memory:
            return False
        alignment = self.capabilities.alignment
        return not (buffer.address % alignment or buffer.nbytes % alignment)


def _abandoned(answer: object) -> bool:
    status = answer.status if isinstance(answer, GetResult) else answer
    return status is Status.ABANDONED


def capabilities(
    *, durability: str, direct: bool, io: str, device: bool, gds: bool
) -> Capabilities:
    """What a connector with these options claims.

    Args:
        durability, direct: the options.
        io: posix or kvikio.
        device: kvikio runs with a real driver.
        gds: and cuFile moves bytes straight to the device, without a bounce through the host.
    """
    kinds = {MemoryKind.HOST, *((MemoryKind.PINNED, MemoryKind.DEVICE) if device else ())}
    return Capabilities(
        max_concurrency=8,
        max_batch=128,
        max_value_bytes=1 << 40,
        alignment=ALIGNMENT if direct else 1,
        memory=frozenset(kinds),
        # kvikio bounces what is not aligned, and device memory where there is no GDS.
        zero_copy=io == "posix" or (direct and gds == device),
        regions=gds,
        scan=True,
        durability=Durability.HOST if durability == "host" else Durability.PROCESS,
        sharing=Sharing.HOST,
    )
