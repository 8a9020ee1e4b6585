"""What the scheduler's side and the workers' side tell each other in each step.

Both travel inside vLLM's own objects; they hold plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_core.cache import ArenaHandle


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks of one group in one chunk.

    Attributes:
        slot_offset: of the chunk's slot in the arena, in bytes.
        at: where the group's bytes start in the payload; a worker's part lies further on.
        group: index in vLLM's configuration.
        first_block: index among the group's stored blocks of the first that moves.
        block_ids: engine pages, in order.
    """

    slot_offset: int
    at: int
    group: int
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
        await_stores: another engine waits for what this step stores.
    """

    arena: ArenaHandle
    loads: list[Job] = field(default_factory=list)
    stores: list[Job] = field(default_factory=list)
    fence: frozenset[int] = frozenset()
    await_stores: bool = False


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler: per job id, how many workers have done it and failed it."""

    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, int] = field(default_factory=dict)

    @property
    def jobs(self) -> set[int]:
        """Every job that some worker has ended."""
        return self.done.keys() | self.failed.keys()

    def ended(self, job_id: int) -> tuple[int, int]:
        """How many workers have done the job, and failed it."""
        return self.done.get(job_id, 0), self.failed.get(job_id, 0)

    def forget(self, job_id: int) -> None:
        """Count the job no more."""
        self.done.pop(job_id, None)
        self.failed.pop(job_id, None)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Sum of the counts of two workers."""
        assert isinstance(other, WorkerMetadata)
        total = WorkerMetadata(dict(self.done), dict(self.failed))
        for mine, theirs in ((total.done, other.done), (total.failed, other.failed)):
            for job_id, count in theirs.items():
                mine[job_id] = mine.get(job_id, 0) + count
        return total
