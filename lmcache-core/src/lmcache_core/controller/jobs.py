"""Jobs: made, handed out, reported, ended.  What follows from what stands in `plans`."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from lmcache_core.agent import wire
from lmcache_core.controller import plans
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.documents import Documents, StoreDown
from lmcache_core.controller.messages import JobKind
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.controller.records import ENDED, JobRecord, PartRecord
from lmcache_core.controller.registry import Record

MAX_PARTS = 1024
SLICE_PIN = "job:"
"""Begins the name of a pin that belongs to its job; instances get it with the job's id."""
MAX_TOLD = 64
"""Orders that an instance has at a time."""
_REPLY_BYTES = 8 << 20
_AGAIN_S = 2.0
"""An order that an instance has not mentioned since is told again: the answer may be lost."""
_NOTE_S = 0.5
"""Progress that ends nothing is written at most so often."""
_ORDER: msgspec.msgpack.Decoder[wire.Order] = msgspec.msgpack.Decoder(wire.Order)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part that is to be, and its order, whose id is not known yet; see `PartRecord`."""

    instance: str
    order: wire.Order
    after: tuple[int, ...] = ()
    needs: tuple[int, ...] = ()
    keys_of: int = -1
    cleanup: bool = False


class Jobs:
    """Belongs to one event loop.  What is async raises `StoreDown` unless it says otherwise.

    Args:
        woken: called with the name of an instance that may be owed something.
    """

    def __init__(
        self,
        config: ControllerConfig,
        documents: Documents,
        *,
        now_s: Callable[[], float],
        wall_s: Callable[[], float],
        woken: Callable[[str], None],
    ) -> None:
        self._config = config
        self._documents = documents
        self._now_s, self._wall_s = now_s, wall_s
        self._woken = woken
        self._order_s = config.job_timeout_s + 60.0
        self._live: dict[str, JobRecord] = {}
        self._of_instance: dict[str, set[str]] = defaultdict(set)
        self._changed: dict[str, asyncio.Event] = {}
        self._noted_s: dict[str, float] = {}
        documents.listen(self._heard)

    @property
    def live(self) -> dict[str, JobRecord]:
        """Those that have not ended, by id."""
        return self._live

    def all(self) -> list[JobRecord]:
        """Those that are kept, newest first."""
        jobs: list[JobRecord] = list(self._documents.all("job").values())
        return sorted(jobs, key=lambda job: (job.made_s, job.id), reverse=True)

    async def get(self, id: str) -> JobRecord:
        """The job.

        Raises:
            Refusal: there is none (any more).
        """
        found: JobRecord | None = await self._documents.load("job", id)
        if found is None:
            raise not_found("job", id, hint="ended jobs are kept for a while only")
        return found

    async def create(
        self, kind: JobKind, steps: Sequence[Step], *, id: str, pin: str = ""
    ) -> JobRecord:
        """A job, or the one that has this id already.

        Raises:
            Refusal: too many jobs, or too large a one.
        """
        there: JobRecord | None = await self._documents.load("job", id)
        if there is not None:
            return there
        self.check_room(len(steps))
        now_s = self._wall_s()
        orders: dict[bytes, str] = {}
        parts = []
        for step in steps:
            body = msgspec.msgpack.encode(step.order)
            if body not in orders:  # many instances often get the same
                orders[body] = secrets.token_hex(12)
                await self._documents.put_bytes("order", orders[body], body, ttl_s=self._order_s)
            parts.append(_part(step, orders[body]))
        job = JobRecord(
            id=id,
            kind=kind,
            made_s=now_s,
            until_s=now_s + self._config.job_timeout_s,
            parts=tuple(parts),
            pin=pin,
        )
        job = plans.settle(job, now_s)
        if await self._documents.create("job", id, job, ttl_s=self._ttl_s(job)):
            return job
        return await self.get(id)

    def check_room(self, parts: int) -> None:
        """Nothing, when a job of so many parts may be made.

        Raises:
            Refusal: too many jobs, or too large a one.
        """
        if len(self._live) >= self._config.max_live_jobs:
            raise Refusal(
                429,
                "too_many_jobs",
                f"{len(self._live)} jobs are running",
                hint="wait for some, or cancel them",
                retry_after_s=5,
            )
        if parts > MAX_PARTS:
            raise Refusal(
                422,
                "too_large",
                f"this needs {parts} parts, of at most {MAX_PARTS}",
                hint="select less at a time",
            )

    async def cancel(self, id: str) -> JobRecord:
        """Ask a job to end; one that has ended stays as it is.

        Raises:
            Refusal: there is none.
        """
        await self.get(id)
        job = await self._change(id, lambda job: plans.cancelled(job, self._wall_s()))
        if job is None:
            raise not_found("job", id)
        return job

    async def wait(self, id: str, wait_s: float) -> JobRecord:
        """The job when it has ended, or after ``wait_s``.

        Raises:
            Refusal: there is none.
        """
        job = await self.get(id)
        loop = asyncio.get_running_loop()
        end_s = loop.time() + wait_s
        while job.ended_s is None:
            changed = self._changed.setdefault(id, asyncio.Event())
            try:
                await asyncio.wait_for(changed.wait(), max(0.0, end_s - loop.time()))
            except (asyncio.TimeoutError, TimeoutError):
                return await self.get(id)
            job = await self.get(id)
        return job

    async def heard(
        self, record: Record, said: Sequence[wire.Progress]
    ) -> tuple[list[str], list[str]]:
        """Record what an instance tells of its orders.  Never raises `StoreDown`: what could not
        be recorded is told again.

        Returns:
            Ids of orders whose end was recorded, and of those that nobody wants any more.

        Raises:
            Refusal: it holds keys that it was not to hold.
        """
        recorded: list[str] = []
        unwanted: list[str] = []
        for progress in said:
            place = plans.part_of(progress.id)
            if place is None:
                continue  # a pin's: see Pins
            try:
                job = await self._progressed(record, *place, progress)
            except StoreDown:
                continue
            number = place[1]
            if progress.state != "running":
                recorded.append(progress.id)
                record.told.pop(progress.id, None)
            elif job is None or number >= len(job.parts) or job.parts[number].state in ENDED:
                unwanted.append(progress.id)
        return recorded, unwanted

    async def due(self, record: Record) -> tuple[list[wire.Order], list[str]]:
        """Orders that the instance is to be told now, and ids of those that it is to stop."""
        orders: list[wire.Order] = []
        stop: list[str] = []
        nbytes = 0
        room = MAX_TOLD - self._working(record)
        for id in sorted(self._of_instance.get(record.name, ())):
            job = self._live[id]
            restarted = plans.restarted(job, record.name, record.incarnation, self._wall_s())
            if restarted is not job:
                await self._change(
                    id,
                    lambda job: plans.restarted(
                        job, record.name, record.incarnation, self._wall_s()
                    ),
                )
                continue
            for number in plans.unwanted(job, record.name, record.incarnation):
                if self._once(record, "stop:" + plans.order_id(id, number)):
                    stop.append(plans.order_id(id, number))
            for number in plans.owed(job, record.name, record.incarnation):
                if room <= 0 or nbytes >= _REPLY_BYTES:
                    break
                if not self._once(record, plans.order_id(id, number)):
                    continue
                order = await self._order(job, number)
                if order is not None:
                    orders.append(order)
                    nbytes += len(getattr(order, "keys", None) or b"")
                    room -= 1
        return orders, stop

    async def tick(self, lost: Collection[str]) -> None:
        """End what is overdue, and drop what is kept too long.

        Args:
            lost: instances that have not spoken to any controller for the lease.
        """
        for id, job in list(self._live.items()):
            gone = any(p.instance in lost and p.state not in ENDED for p in job.parts)
            if gone or self._wall_s() >= job.until_s:
                await self._change(id, lambda job: plans.overdue(job, lost, self._wall_s()))
        ended = [job for job in self.all() if job.ended_s is not None]
        keep_s = self._config.job_keep_s
        now_s = self._wall_s()
        for number, job in enumerate(ended):
            if number >= self._config.max_jobs or now_s - (job.ended_s or now_s) > keep_s:
                await self._documents.remove("job", job.id)

    def instances(self) -> set[str]:
        """That live jobs have parts of."""
        return {name for name, jobs in self._of_instance.items() if jobs}

    def _working(self, record: Record) -> int:
        """Orders that the instance has now, as far as it is known."""
        return sum(
            part.state == "running" and part.instance == record.name
            for id in self._of_instance.get(record.name, ())
            for part in self._live[id].parts
        )

    def _once(self, record: Record, id: str) -> bool:
        """Whether ``id`` was not told a moment ago."""
        now_s = self._now_s()
        if now_s - record.told.get(id, float("-inf")) < _AGAIN_S:
            return False
        if len(record.told) > 4096:
            record.told.clear()
        record.told[id] = now_s
        return True

    async def _order(self, job: JobRecord, number: int) -> wire.Order | None:
        part = job.parts[number]
        body = await self._documents.get_bytes("order", part.order)
        held: bytes | None = b""
        if part.keys_of >= 0:
            held = await self._documents.get_bytes("held", plans.order_id(job.id, part.keys_of))
        if body is None or held is None:
            why = "its order is lost from the state"
            await self._change(job.id, lambda job: plans.failed(job, [number], why, self._wall_s()))
            return None
        order = replace(_ORDER.decode(body), id=plans.order_id(job.id, number))
        pin = getattr(order, "pin", "")
        if pin.startswith(SLICE_PIN):
            order = replace(order, pin=f"{SLICE_PIN}{job.id}:{pin[len(SLICE_PIN) :]}")
        if part.keys_of >= 0:
            order = replace(order, keys=held)
            source = job.parts[part.keys_of]
            if isinstance(order, wire.Copy) and source.held < source.total:
                order = replace(order, chained=False)
        return order

    async def _progressed(
        self, record: Record, id: str, number: int, said: wire.Progress
    ) -> JobRecord | None:
        job: JobRecord | None = await self._documents.load("job", id)
        if job is None or number >= len(job.parts):
            return None
        part = job.parts[number]
        if part.instance != record.name:
            raise Refusal(400, "bad_sync", f"order {said.id} is another instance's")
        if part.state in ENDED:
            return job
        if said.state == "running" and part.state == "running":
            fresh = self._now_s() - self._noted_s.get(said.id, float("-inf")) < _NOTE_S
            if fresh and part.incarnation == record.incarnation:
                return job
        if said.state == "done" and said.held:
            await self._hold(job, number, said)
        if len(self._noted_s) > 4096:
            self._noted_s.clear()
        self._noted_s[said.id] = self._now_s()
        return await self._change(
            id,
            lambda job: plans.progressed(
                job, number, said, incarnation=record.incarnation, now_s=self._wall_s()
            ),
        )

    async def _hold(self, job: JobRecord, number: int, said: wire.Progress) -> None:
        """Keep what a part holds, before the part ends: what follows has these keys."""
        if not any(part.keys_of == number for part in job.parts):
            return
        order = await self._order(job, number)
        if order is None:
            return
        wanted = wire.split(getattr(order, "keys", None) or b"")
        try:
            held = set(wire.split(said.held))
        except ValueError as error:
            raise Refusal(400, "bad_sync", f"order {said.id}: {error}") from error
        if not held <= set(wanted):
            raise Refusal(400, "bad_sync", f"order {said.id} holds keys that it has not")
        body = wire.join([key for key in wanted if key in held])
        await self._documents.put_bytes(
            "held", plans.order_id(job.id, number), body, ttl_s=self._order_s
        )

    async def _change(self, id: str, step: Callable[[JobRecord], JobRecord]) -> JobRecord | None:
        job: JobRecord | None = await self._documents.change("job", id, step, ttl_s=self._ttl_s)
        return job

    def _ttl_s(self, job: JobRecord) -> float | None:
        return None if job.ended_s is None else self._config.job_keep_s

    def _heard(self, kind: str, id: str) -> None:
        if kind != "job":
            return
        job: JobRecord | None = self._documents.find("job", id)
        before = self._live.pop(id, None)
        if before is not None:
            for part in before.parts:
                self._of_instance[part.instance].discard(id)
        if job is not None and job.ended_s is None:
            self._live[id] = job
            for part in job.parts:
                self._of_instance[part.instance].add(id)
        for part in (job or before or _NOTHING).parts:
            self._woken(part.instance)
        changed = self._changed.pop(id, None)
        if changed is not None:
            changed.set()


def _part(step: Step, order: str) -> PartRecord:
    return PartRecord(
        instance=step.instance,
        op=type(step.order).__struct_config__.tag,  # type: ignore[arg-type]
        order=order,
        after=step.after,
        needs=step.needs,
        keys_of=step.keys_of,
        cleanup=step.cleanup,
    )


_NOTHING = JobRecord(id="", kind="clear", made_s=0, until_s=0, parts=())
