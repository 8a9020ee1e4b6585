"""``lmc``'s commands for a whole fleet, through its controllers; and ``lmc jobs`` and ``quota``."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from lmcache_core.cli.fleet_act import HOUR_S, act_app
from lmcache_core.cli.fleet_command import ASKED, DONE, command
from lmcache_core.cli.fleet_jobs import (
    TimeoutS,
    Wish,
    complaints,
    follow,
    job_path,
    outcome,
    say,
    summary,
)
from lmcache_core.cli.fleet_link import Fleet
from lmcache_core.cli.fleet_options import make, tenant_of
from lmcache_core.cli.fleet_read import read_app
from lmcache_core.cli.fleet_text import clock, counts, duration, plain, pretty, size, table
from lmcache_core.cli.show import Json
from lmcache_core.config import parse_size
from lmcache_core.controller.messages import Job, Jobs, Quota, QuotaRequest, Quotas
from lmcache_core.sdk import ConfigError

fleet_app = typer.Typer()
fleet_app.add_typer(read_app)
fleet_app.add_typer(act_app)


@command(
    fleet_app,
    examples="lmc jobs   |   lmc jobs --state running   |   lmc jobs 9c1e --wait   |   "
    "lmc jobs 9c1e --cancel",
    exits="Exit codes: 0 answered, and the job, if one is named, is done, or cancelled by "
    "--cancel; 1 it failed, or is done in part; 2 wrong command line, token or request; 3 no "
    "controller answers; 4 it still runs; 130 Ctrl-C: the job goes on.",
)
def jobs(
    fleet: Fleet,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Only this one, with its parts.")] = "",
    cancel: Annotated[
        bool, typer.Option("--cancel", help="End it; what it did stays done.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
    timeout_s: TimeoutS = HOUR_S,
    state: Annotated[str, typer.Option(help="Of a list: running, done, failed or cancelled.")] = "",
    limit: Annotated[int, typer.Option(help="Of a list.", min=1, max=1000)] = 50,
    as_json: Json = False,
) -> int:
    """List jobs, newest first; or show, watch or cancel one."""
    if not job:
        if cancel or wait:
            raise ConfigError("which job?", hint="lmc jobs lists them")
        return _list_jobs(fleet, state, limit, as_json)
    if cancel:
        got = fleet.post(f"{job_path(job)}/cancel", None, Job)
    else:
        got = fleet.get(job_path(job), Job)
    if wait:
        got = follow(fleet, got, Wish(True, timeout_s, as_json))
    if cancel and (got.value.state == "cancelled" or not wait):
        typer.echo(pretty(got.body) if as_json else summary(got.value))
        return DONE
    if as_json or wait:
        say(got, as_json)
    else:
        _show_job(got.value)
    return outcome(got.value)


@command(
    fleet_app,
    examples="lmc quota   |   lmc quota --tenant-file salt --bytes 20GiB --tier host   |   "
    "lmc quota --remove 5d20",
    exits=ASKED,
)
def quota(
    fleet: Fleet,
    limit: Annotated[
        str, typer.Option("--bytes", help="Set the most that a tenant may take, like 20GiB.")
    ] = "",
    tenant_file: Annotated[
        str, typer.Option(metavar="FILE|-", help="File with its cache_salt, or LMCACHE_TENANT.")
    ] = "",
    tenant: Annotated[
        str | None, typer.Option(metavar="SALT", help="The salt itself: better --tenant-file.")
    ] = None,
    tenant_id: Annotated[
        str, typer.Option(metavar="ID", help="The tenant as `lmc usage` shows it.")
    ] = "",
    tier: Annotated[str, typer.Option(help="Of tiers with this name; * is every tier.")] = "*",
    remove: Annotated[str, typer.Option(metavar="QUOTA", help="End this one.")] = "",
    as_json: Json = False,
) -> int:
    """List the limits of tenants; or set one with --bytes, or end one with --remove.

    A limit holds in each tier of each instance.
    """
    if remove:
        if limit:
            raise ConfigError("--bytes and --remove", hint="give one of them")
        fleet.remove(f"/v1/quotas/{quote(remove, safe='')}")
        typer.echo("null" if as_json else f"quota {plain(remove)} ended")
        return DONE
    if limit:
        who = tenant_of(tenant, tenant_file, tenant_id)
        if not who:
            raise ConfigError("whose limit?", hint="give --tenant-file or --tenant-id")
        request = make(QuotaRequest, {"bytes": parse_size(limit), "tier": tier, **who})
        one = fleet.put("/v1/quotas", request, Quota)
        typer.echo(pretty(one.body) if as_json else f"quota {plain(one.value.id)} set")
        return DONE
    if tenant is not None or tenant_file or tenant_id:
        raise ConfigError("a tenant, and no limit", hint="set one with --bytes")
    got = fleet.get("/v1/quotas", Quotas)
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {"id": row.id, "tenant_id": row.tenant_id or "none", "tier": row.tier}
        | {"limit": size(row.bytes)}
        for row in got.value.quotas
    ]
    table(rows, ["id", "tenant_id", "tier", "limit"], empty="no quotas")
    return DONE


def _list_jobs(fleet: Fleet, state: str, limit: int, as_json: bool) -> int:
    got = fleet.get("/v1/jobs", Jobs, query={"state": state, "limit": str(limit)})
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "chunks": f"{job.settled:,} of {job.total:,}",
            "moved": size(job.bytes),
            "begun": clock(job.made_s),
            "took": duration(job.ended_s - job.made_s) if job.ended_s is not None else "",
            "errors": job.error or counts(job.errors),
        }
        for job in got.value.jobs
    ]
    columns = ["id", "kind", "state", "chunks", "moved", "begun", "took", "errors"]
    table(rows, columns, empty="no jobs")
    return DONE


def _show_job(job: Job) -> None:
    typer.echo(summary(job))
    for reason in complaints(job):
        typer.echo(f"error: {reason}", err=True)
    rows = [
        {
            "part": part.number,
            "instance": part.instance,
            "does": part.op,
            "state": part.state,
            "chunks": f"{part.settled:,} of {part.total:,}",
            "moved": size(part.bytes),
            "after": [str(number) for number in part.after],
        }
        for part in job.parts
    ]
    columns = ["part", "instance", "does", "state", "chunks", "moved", "after"]
    table(rows, columns, empty="it has no parts")
