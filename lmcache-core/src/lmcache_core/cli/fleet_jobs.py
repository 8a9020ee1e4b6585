"""A job's way to its end: waiting, progress, and what is said about it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmcache_core.cli.fleet_command import DONE, FAILED, INTERRUPTED, RUNNING
from lmcache_core.cli.fleet_link import TIMEOUT_S, Fleet, Got
from lmcache_core.cli.fleet_text import counted, counts, duration, plain, pretty, size
from lmcache_core.controller.messages import Job
from lmcache_core.sdk import BackendUnavailable

AWAY_S = 60.0
"""How long no controller may answer while a job is waited for."""
_LIVE_POLL_S = 1.0
_QUIET_POLL_S = 20.0
_FLOOR_S = 0.2
MAX_REASONS = 20

Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait for the end, or print the job's id.")
]
TimeoutS = Annotated[float, typer.Option(help="Wait for so long at most.", min=0, max=7 * 86400)]


@dataclass(frozen=True, slots=True)
class Wish:
    """Whether to wait for a job, for how long, and how to print it."""

    wait: bool
    timeout_s: float
    as_json: bool


def job_path(job_id: str) -> str:
    """Of one job."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def settle(fleet: Fleet, got: Got[Job], wish: Wish) -> int:
    """See a job to its end, if wished; print it; returns the exit code.

    Raises:
        BackendUnavailable: no controller has answered for `AWAY_S`; the job goes on.
        typer.Exit: of Ctrl-C.
    """
    if not wish.wait:
        typer.echo(pretty(got.body) if wish.as_json else plain(got.value.id))
        return FAILED if got.value.state in ("failed", "cancelled") else DONE
    got = follow(fleet, got, wish)
    say(got, wish.as_json)
    return outcome(got.value)


def follow(fleet: Fleet, got: Got[Job], wish: Wish) -> Got[Job]:
    """The job when it has ended, or when ``wish.timeout_s`` is over.  Raises as `settle` does."""
    end_s = time.monotonic() + wish.timeout_s
    heard_s = time.monotonic()
    try:
        with _progress(got.value) as show:
            poll_s = _LIVE_POLL_S if show is not None else _QUIET_POLL_S
            while got.value.state == "running" and time.monotonic() < end_s:
                asked_s = time.monotonic()
                wait_s = min(poll_s, end_s - asked_s)
                try:
                    got = fleet.get(
                        job_path(got.value.id),
                        Job,
                        query={"wait_s": f"{wait_s:.3f}"},
                        timeout_s=wait_s + TIMEOUT_S,
                    )
                    heard_s = time.monotonic()
                    if show is not None:
                        show(got.value)
                except BackendUnavailable as error:
                    if time.monotonic() - heard_s > AWAY_S:
                        raise _lost(got.value, error) from error
                if got.value.state == "running":
                    # Whatever answers at once, time after time, is not asked without a break.
                    time.sleep(max(0.0, min(_FLOOR_S - (time.monotonic() - asked_s), wait_s)))
    except KeyboardInterrupt:
        if wish.as_json:
            typer.echo(pretty(got.body))
        typer.echo(f"interrupted; {_goes_on(got.value)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    return got


def outcome(job: Job) -> int:
    """The exit code that tells how a job stands."""
    if job.state == "running":
        return RUNNING
    return FAILED if complaints(job) else DONE


def complaints(job: Job) -> list[str]:
    """What did not go as asked, a sentence each; none when all did."""
    found = []
    if job.state in ("failed", "cancelled") or job.error:
        why = f": {plain(job.error)}" if job.error else ""
        ended = job.state if job.state in ("failed", "cancelled") else "failed in part"
        found.append(f"{job.kind} {ended}{why}")
    elif job.errors:
        found.append(f"{job.kind} is done in part: {counts(job.errors)}")
    for part in job.parts:
        reasons = [plain(part.error)] if part.error else []
        reasons += [counts(part.errors)] if part.errors else []
        if reasons or part.state == "failed":
            text = "; ".join(reasons) or "failed"
            found.append(f"{plain(part.instance)}, {plain(part.op)}: {text}")
    return found


def say(got: Got[Job], as_json: bool) -> None:
    """Print a job: on stdout what it did, on stderr what it didn't."""
    job = got.value
    typer.echo(pretty(got.body) if as_json else summary(job))
    if job.state == "running":
        typer.echo(_goes_on(job), err=True)
        return
    reasons = complaints(job)
    for reason in reasons[:MAX_REASONS]:
        typer.echo(f"error: {reason}", err=True)
    if len(reasons) > MAX_REASONS:
        typer.echo(f"and {len(reasons) - MAX_REASONS} more: lmc jobs {plain(job.id)}", err=True)


def summary(job: Job) -> str:
    """One line: what it is, how far, how long."""
    end_s = job.ended_s if job.ended_s is not None else time.time()
    amount = counted(job.total, "chunk")
    if job.settled != job.total:
        amount = f"{job.settled:,} of {amount}"
    text = f"job {plain(job.id)}: {job.kind} {job.state}, {amount}, {size(job.bytes)}"
    before = sum(part.notes.get("before_bytes", 0) for part in job.parts)
    after = sum(part.notes.get("after_bytes", 0) for part in job.parts)
    if before and after:
        text += f" ({size(before)} -> {size(after)})"
    return f"{text}, {duration(end_s - job.made_s)}"


def _goes_on(job: Job) -> str:
    name = plain(job.id)
    return f"the job goes on: lmc jobs {name} --wait watches it, lmc jobs {name} --cancel ends it"


def _lost(job: Job, error: BackendUnavailable) -> BackendUnavailable:
    return BackendUnavailable(
        f"{error.message}, for {AWAY_S:.0f} s", op="controller", hint=_goes_on(job)
    )


@contextlib.contextmanager
def _progress(job: Job) -> Iterator[Callable[[Job], None] | None]:
    """What draws a bar on stderr; None where nobody sees it."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks {task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(job.kind, total=job.total or None, amount="")

        def show(now: Job) -> None:
            ended = sum(part.state in ("done", "failed", "cancelled") for part in now.parts)
            progress.update(
                task,
                description=f"{now.kind}, {ended} of {counted(len(now.parts), 'part')} done",
                total=now.total or None,
                completed=now.settled,
                amount=size(now.bytes),
            )

        show(job)
        yield show
