"""What the scheduler's side and the workers' side tell each other in each step.

Both travel inside vLLM's own objects; they hold plain values only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_core.memory.arena import Arena, ArenaRef


class ArenaHandle:
    """The host tier's memory, as a worker gets it: the live arena where scheduler and worker
    share a process, else a reference to map.  Only the reference is ever pickled."""

    __slots__ = ("_live", "ref")

    def __init__(self, ref: ArenaRef, live: Arena | None = None) -> None:
        self.ref = ref
        self._live = live

    def __reduce__(self) -> tuple[type[ArenaHandle], tuple[ArenaRef]]:
        return ArenaHandle, (self.ref,)

    def attach(self, *, warn: Callable[[str], None], prefault: bool) -> tuple[Arena, bool]:
        """The arena, and whether it is the caller's to close.

        Raises:
            ArenaError: it can't be mapped here.
        """
        if self._live is not None:
            return self._live, False
        return Arena.attach(self.ref, warn=warn, prefault=prefault), True


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks of one chunk.

    Attributes:
        slot_offset: of the chunk's slot in the arena, in bytes.
        first_block: index inside the chunk of the first block that moves.
        block_ids: engine pages, in order.
    """

    slot_offset: int
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One offload or onboard of one request; confirmed by its id."""

    job_id: int
    req_id: str
    spans: tuple[Span, ...]
    parked: bool = False
    """For onboards: the request waits for it, instead of the step."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers.

    Attributes:
        arena: the host tier's memory, to be mapped once.
        loads, stores: what to move.
        fence: pages that this step may overwrite; stores that still read them end first.
    """

    arena: ArenaHandle
    loads: list[Job] = field(default_factory=list)
    stores: list[Job] = field(default_factory=list)
    fence: frozenset[int] = frozenset()


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler: per job id, how many workers have done it and failed it."""

    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Sum of the counts of two workers."""
        assert isinstance(other, WorkerMetadata)
        total = WorkerMetadata(dict(self.done), dict(self.failed))
        for mine, theirs in ((total.done, other.done), (total.failed, other.failed)):
            for job_id, count in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + count
        return total
