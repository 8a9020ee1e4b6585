"""How a job goes on.  Pure: a job and what happened give a job."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.records import ENDED, JobRecord, PartRecord
from lmcache_core.keys import STORED_KEY_BYTES

LOST = "instance lost"
LATE = "not done in time"


def order_id(job: str, number: int) -> str:
    """The id under which an instance knows a part."""
    return f"{job}.{number}"


def part_of(order: str) -> tuple[str, int] | None:
    """The reverse of `order_id`; None when it is no part of a job."""
    job, dot, number = order.rpartition(".")
    return (job, int(number)) if dot and number.isascii() and number.isdecimal() else None


def owed(job: JobRecord, instance: str, incarnation: str) -> list[int]:
    """Parts that this process of the instance is to be told of: they may begin, and it has said
    nothing of them yet."""
    if job.ended_s is not None:
        return []
    return [
        number
        for number, part in enumerate(job.parts)
        if part.instance == instance
        and part.state not in ENDED
        and part.incarnation != incarnation
        and (part.cleanup or not job.cancelled)
        and _may_begin(job, part)
    ]


def unwanted(job: JobRecord, instance: str, incarnation: str) -> list[int]:
    """Parts that this process works at, and that it is to stop."""
    if not job.cancelled or job.ended_s is not None:
        return []
    return [
        number
        for number, part in enumerate(job.parts)
        if part.instance == instance
        and part.state == "running"
        and part.incarnation == incarnation
        and not part.cleanup
    ]


def progressed(
    job: JobRecord,
    number: int,
    said: wire.Progress,
    *,
    incarnation: str,
    now_s: float,
) -> JobRecord:
    """The job after an instance told of a part.  Telling it twice, or late, changes nothing."""
    part = job.parts[number]
    if part.state in ENDED:
        return job
    same = part.incarnation == incarnation
    new = replace(
        part,
        state=said.state,
        incarnation=incarnation,
        total=max(said.total, part.total if same else 0),
        settled=max(said.settled, part.settled if same else 0),
        nbytes=max(said.nbytes, part.nbytes if same else 0),
        errors=dict(said.errors),
        error=said.error,
        held=len(said.held) // STORED_KEY_BYTES,
        notes=dict(said.notes),
    )
    return settle(_with(job, {number: new}), now_s)


def cancelled(job: JobRecord, now_s: float) -> JobRecord:
    """The job after somebody cancelled it: what has not begun never does."""
    return job if job.ended_s is not None else settle(replace(job, cancelled=True), now_s)


def restarted(job: JobRecord, instance: str, incarnation: str, now_s: float) -> JobRecord:
    """The job when ``incarnation`` is the instance's process now: what an earlier one worked at,
    and nobody wants any more, has ended with it."""
    if not job.cancelled or job.ended_s is not None:
        return job
    ended = {
        number: replace(part, state="cancelled")
        for number, part in enumerate(job.parts)
        if part.instance == instance
        and part.state == "running"
        and part.incarnation != incarnation
        and not part.cleanup
    }
    return settle(_with(job, ended), now_s) if ended else job


def failed(job: JobRecord, numbers: Collection[int], why: str, now_s: float) -> JobRecord:
    """The job after these parts failed, of those that had not ended."""
    ended = {
        number: replace(job.parts[number], state="failed", error=why)
        for number in numbers
        if job.parts[number].state not in ENDED
    }
    return settle(_with(job, ended), now_s) if ended else job


def overdue(job: JobRecord, lost: Collection[str], now_s: float) -> JobRecord:
    """The job after parts of ``lost`` instances failed, and all of it when its time is over."""
    if job.ended_s is not None:
        return job
    gone = [number for number, part in enumerate(job.parts) if part.instance in lost]
    job = failed(job, gone, LOST, now_s)
    if now_s >= job.until_s:
        job = failed(job, range(len(job.parts)), LATE, now_s)
    return job


def settle(job: JobRecord, now_s: float) -> JobRecord:
    """The job with all that follows: parts that can't begin any more have ended, and so has the
    job when all parts have."""
    parts = list(job.parts)
    for number, part in enumerate(parts):
        if part.state == "waiting":
            parts[number] = _followed(parts, part, job.cancelled)
    if all(part.state in ENDED for part in parts) and job.ended_s is None:
        return replace(job, parts=tuple(parts), ended_s=now_s)
    return replace(job, parts=tuple(parts))


def shown(job: JobRecord) -> messages.Job:
    """The job as the API has it."""
    errors: dict[str, int] = {}
    for part in job.parts:
        for reason, chunks in part.errors.items():
            errors[reason] = errors.get(reason, 0) + chunks
    # What is held for another instance to read is moved once.
    held_for = {part.keys_of for part in job.parts if part.op == "copy"}
    moved = [part.nbytes for number, part in enumerate(job.parts) if number not in held_for]
    return messages.Job(
        id=job.id,
        kind=job.kind,
        state=state_of(job),
        made_s=job.made_s,
        ended_s=job.ended_s,
        total=sum(part.total for part in job.parts),
        settled=sum(part.settled for part in job.parts),
        bytes=sum(moved),
        errors=errors,
        error=next(
            (f"{p.instance}: {p.error or 'failed'}" for p in job.parts if p.state == "failed"), ""
        ),
        parts=[_shown_part(number, part) for number, part in enumerate(job.parts)],
        pin=job.pin,
    )


def state_of(job: JobRecord) -> messages.JobState:
    """Of the whole job."""
    states = {part.state for part in job.parts}
    if job.ended_s is None:
        return "running"
    if job.cancelled and "cancelled" in states:
        return "cancelled"
    return "failed" if states & {"failed", "cancelled"} else "done"


def _followed(parts: list[PartRecord], part: PartRecord, job_cancelled: bool) -> PartRecord:
    """A waiting part after what became of those before it."""
    if part.cleanup:
        before = [parts[number] for number in part.after]
        never = all(p.state == "cancelled" and not p.incarnation for p in before)
        return replace(part, state="cancelled") if never else part
    if job_cancelled:
        return replace(part, state="cancelled")
    for number in part.needs:
        if parts[number].state in ("failed", "cancelled"):
            return replace(part, state="cancelled", error=f"part {number} was not done")
    source = part.keys_of
    if source >= 0 and parts[source].state == "done" and not parts[source].held:
        return replace(part, state="done")
    return part


def _may_begin(job: JobRecord, part: PartRecord) -> bool:
    return all(job.parts[n].state in ENDED for n in part.after) and all(
        job.parts[n].state == "done" for n in part.needs
    )


def _with(job: JobRecord, changed: dict[int, PartRecord]) -> JobRecord:
    parts = tuple(changed.get(number, part) for number, part in enumerate(job.parts))
    return replace(job, parts=parts)


def _shown_part(number: int, part: PartRecord) -> messages.Part:
    return messages.Part(
        number=number,
        instance=part.instance,
        op=part.op,
        state=part.state,
        after=list(part.after),
        total=part.total,
        settled=part.settled,
        bytes=part.nbytes,
        errors=part.errors,
        error=part.error,
        notes=part.notes,
    )
