"""What ``lmc clear`` asks first: what would go."""

from __future__ import annotations

import sys

import typer

from lmcache_core.cli.fleet_command import FAILED
from lmcache_core.cli.fleet_link import Fleet
from lmcache_core.cli.fleet_text import counted, plain, size
from lmcache_core.controller.messages import (
    ClearRequest,
    LookupReply,
    LookupRequest,
    Usage,
    UsageReply,
)
from lmcache_core.sdk import ConfigError

MAX_LINES = 10


def may_clear(fleet: Fleet, request: ClearRequest) -> None:
    """Say what would go, and ask.

    Raises:
        ConfigError: nobody is there to ask.
        typer.Exit: the answer was no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("clear asks first, and this is no terminal", hint="give --yes")
    for line in what_goes(fleet, request):
        typer.echo(line, err=True)
    if not typer.confirm("Clear it?", default=False, err=True):
        typer.echo("nothing was cleared", err=True)
        raise typer.Exit(FAILED)


def what_goes(fleet: Fleet, request: ClearRequest) -> list[str]:
    """Sentences that say it.  Raises as `Fleet.get` does."""
    select = request.select
    where = f"in {', '.join(request.tiers) or 'every tier'} of "
    where += ", ".join(request.instances) or "every instance"
    if select.tokens or select.text or select.keys:
        asked = LookupRequest(select=select)
        return _of_prefix(
            request, fleet.post("/v1/lookup", asked, LookupReply, makes=False).value, where
        )
    reply = fleet.get("/v1/usage", UsageReply).value
    rows = [row for row in reply.usage if _meant(row, request)]
    what = "everything"
    what += f" of model {plain(select.model)}" if select.model else ""
    if select.tenant_id:
        what += f" of tenant {select.tenant_id}"
    elif select.tenant is not None:
        what += " of requests without a tenant"
    chunks, nbytes = sum(row.chunks for row in rows), sum(row.bytes for row in rows)
    # Usage has names of models: of several with one name, the one that is meant is part of it.
    least = "at least " if reply.truncated else "at most " if "@" in select.model else ""
    lines = [f"{what}, {where}: {least}{counted(chunks, 'chunk')}, {size(nbytes)}"]
    lines += [
        f"  {plain(row.instance)}/{plain(row.tier)}: {plain(row.model) or 'unknown model'}, "
        f"tenant {row.tenant_id or 'none'}: {counted(row.chunks, 'chunk')}, {size(row.bytes)}"
        for row in rows[:MAX_LINES]
    ]
    return lines + ([f"  and {len(rows) - MAX_LINES} more"] if len(rows) > MAX_LINES else [])


def _of_prefix(request: ClearRequest, reply: LookupReply, where: str) -> list[str]:
    held = [
        one for one in reply.instances if not request.instances or one.instance in request.instances
    ]
    lines = [f"{counted(reply.chunks, 'chunk')} of {plain(reply.model) or 'keys'}, {where}"]
    for one in held[:MAX_LINES]:
        tiers = [
            f"{plain(tier.tier)} {tier.chunks:,}"
            for tier in one.tiers
            if not request.tiers or tier.tier in request.tiers
        ]
        lines.append(f"  {plain(one.instance)} has the first {one.chunks:,}: {', '.join(tiers)}")
    if len(held) > MAX_LINES:
        lines.append(f"  and {len(held) - MAX_LINES} more instances")
    return lines if held else [*lines, "  no instance has its start"]


def _meant(row: Usage, request: ClearRequest) -> bool:
    select = request.select
    if request.instances and row.instance not in request.instances:
        return False
    if request.tiers and row.tier not in request.tiers:
        return False
    if select.model and row.model not in (select.model, select.model.rpartition("@")[0]):
        return False
    if select.tenant_id is not None:
        return row.tenant_id == select.tenant_id
    return select.tenant is None or row.tenant_id == ""
