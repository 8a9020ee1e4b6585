"""``lmc status``, ``instances``, ``lookup``, ``usage``, ``misses``, ``prefixes``, ``pins``: look at
a fleet."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from lmcache_core.cli.fleet_command import ASKED, DONE, FAILED, command
from lmcache_core.cli.fleet_link import Fleet
from lmcache_core.cli.fleet_options import of_prefix
from lmcache_core.cli.fleet_text import (
    ago,
    clock,
    counted,
    counts,
    duration,
    facts,
    plain,
    pretty,
    size,
    table,
)
from lmcache_core.cli.show import Json
from lmcache_core.controller.messages import (
    HealthReply,
    Instance,
    Instances,
    LookupReply,
    LookupRequest,
    Misses,
    Pins,
    Prefixes,
    Selection,
    Tier,
    UsageReply,
)

read_app = typer.Typer()


@command(
    read_app,
    examples="lmc status   |   lmc status --json | jq -r '.problems[]'",
    exits="Exit codes: 0 all is well; 1 degraded; 2 wrong command line, token or request; "
    "3 no controller answers.",
)
def status(fleet: Fleet, as_json: Json = False) -> int:
    """Say how the fleet is: instances, tiers, breakers, and what is wrong."""
    health = fleet.get("/v1/health", HealthReply)
    found = health.value
    code = DONE if found.status == "ok" else FAILED
    if as_json:
        typer.echo(pretty(health.body))
        return code
    instances = fleet.get("/v1/instances", Instances).value.instances
    rows = []
    for instance in instances:
        head = {"instance": instance.name, "kind": instance.kind, "state": instance.state}
        tiers = [_tier_row(tier) for tier in instance.tiers] or [_NO_TIER]
        rows += [head | tier for tier in tiers]
    table(rows, ["instance", "kind", "state", *_NO_TIER], empty="no instances yet")
    typer.echo(
        f"{found.status}: {counted(found.instances, 'instance')}, "
        f"{counted(found.chunks, 'chunk')}; controller {plain(found.version)}, up "
        f"{duration(found.uptime_s)}, state in {plain(found.state)}"
    )
    for problem in found.problems:
        typer.echo(f"problem: {plain(problem)}")
    return code


@command(
    read_app,
    examples="lmc instances   |   lmc instances engine-0   |   "
    "lmc instances --json | jq -r '.instances[].name'",
    exits=ASKED,
)
def instances(
    fleet: Fleet,
    name: Annotated[str, typer.Argument(help="Only this one, with all that is known of it.")] = "",
    as_json: Json = False,
) -> int:
    """List instances: engines and node servers, what they serve and how they fare."""
    if name:
        one = fleet.get(f"/v1/instances/{quote(name, safe='')}", Instance)
        if as_json:
            typer.echo(pretty(one.body))
        else:
            _show_instance(one.value)
        return DONE
    got = fleet.get("/v1/instances", Instances)
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "name": one.name,
            "kind": one.kind,
            "state": one.state,
            "models": one.models,
            "chunks": sum(tier.chunks for tier in one.tiers),
            "hits": _hits(one),
            "seen": ago(one.seen_s),
            "version": one.version,
        }
        for one in got.value.instances
    ]
    table(rows, ["name", "kind", "state", "models", "chunks", "hits", "seen", "version"], empty=(
        "no instances yet: engines need `controllers` in their configuration"
    ))  # fmt: skip
    return DONE


@command(
    read_app,
    examples="lmc lookup --text @prompt.txt --model llama   |   "
    "lmc lookup --tokens ids.json --json | jq '.instances[0]'",
    exits=ASKED,
)
def lookup(fleet: Fleet, select: Selection, as_json: Json = False) -> int:
    """Find which instances have a prefix, in which tiers, and how much of it.

    Takes --tokens, --text or --keys.
    """
    asked = LookupRequest(select=of_prefix(select))
    got = fleet.post("/v1/lookup", asked, LookupReply, makes=False)
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    found = got.value
    rows = [
        {
            "instance": one.instance,
            "chunks": one.chunks,
            "tokens": one.tokens,
            "tiers": [f"{tier.tier} {tier.chunks}" for tier in one.tiers],
        }
        for one in found.instances
    ]
    typer.echo(
        f"{counted(found.chunks, 'chunk')} of {found.chunk_size:,} tokens, "
        f"of {plain(found.model) or 'unknown model'}"
        + (f"; the prompt has {found.prompt_tokens:,} tokens" if found.prompt_tokens else "")
    )
    table(rows, ["instance", "chunks", "tokens", "tiers"], empty="no instance has it")
    return DONE


@command(
    read_app,
    examples="lmc usage   |   lmc usage --instance engine-0 --tier host   |   "
    "lmc usage --json | jq '[.usage[].bytes] | add'",
    exits=ASKED,
)
def usage(
    fleet: Fleet,
    instance: Annotated[str, typer.Option(help="Only of this one.")] = "",
    tier: Annotated[str, typer.Option(help="Only of tiers with this name.")] = "",
    as_json: Json = False,
) -> int:
    """Show what each model and tenant takes, in each tier of each instance."""
    got = fleet.get("/v1/usage", UsageReply, query={"instance": instance, "tier": tier})
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "instance": row.instance,
            "tier": row.tier,
            "model": row.model or "unknown",
            "tenant_id": row.tenant_id or "none",
            "lora": row.lora,
            "chunks": f"{row.chunks:,}",
            "size": size(row.bytes),
        }
        for row in got.value.usage
    ]
    columns = ["instance", "tier", "model", "tenant_id", "lora", "chunks", "size"]
    table(rows, columns, empty="nothing is stored")
    if got.value.truncated:
        typer.echo("there is more: instances tell their largest namespaces only", err=True)
    return DONE


@command(
    read_app,
    examples="lmc misses chatcmpl-123   |   "
    "lmc misses chatcmpl-123 --instance engine-0 --json | jq '.misses[].reason'",
    exits=ASKED,
)
def misses(
    fleet: Fleet,
    request_id: Annotated[str, typer.Argument(help="As the engine calls the request.")],
    instance: Annotated[str, typer.Option(help="Ask this one only.")] = "",
    as_json: Json = False,
) -> int:
    """Say why each chunk of a request missed."""
    path = f"/v1/misses/{quote(request_id, safe='')}"
    got = fleet.get(path, Misses, query={"instance": instance})
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "chunk": miss.index,
            "reason": miss.reason or "hit",
            "detail": miss.detail,
            "when": clock(miss.at_s) if miss.at_s else "",
            "key": f"{miss.key[:16]}…",
        }
        for miss in got.value.misses
    ]
    typer.echo(f"{plain(got.value.request_id)} at {plain(got.value.instance)}:")
    table(rows, ["chunk", "reason", "detail", "when", "key"], empty="it has no whole chunk")
    return DONE


@command(
    read_app,
    examples="lmc prefixes   |   lmc prefixes --limit 5 --json | jq '.prefixes[].saved_tokens'",
    exits=ASKED,
)
def prefixes(
    fleet: Fleet,
    limit: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 20,
    as_json: Json = False,
) -> int:
    """Show the prefixes that saved most prefill."""
    got = fleet.get("/v1/prefixes", Prefixes, query={"limit": str(limit)})
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "instance": row.instance,
            "model": row.model or "unknown",
            "tenant_id": row.tenant_id or "none",
            "saved_tokens": f"{row.saved_tokens:,}",
            "requests": f"{row.requests:,}",
            "chunks": row.chunks,
            "first key": f"{row.key[:16]}…",
        }
        for row in got.value.prefixes
    ]
    columns = ["instance", "model", "tenant_id", "saved_tokens", "requests", "chunks", "first key"]
    table(rows, columns, empty="no prefix has saved anything yet")
    return DONE


@command(
    read_app,
    examples="lmc pins   |   lmc pins --json | jq -r '.pins[] | select(.owner==\"ci\") | .id'",
    exits=ASKED,
)
def pins(fleet: Fleet, as_json: Json = False) -> int:
    """List the pins that have not ended."""
    got = fleet.get("/v1/pins", Pins)
    if as_json:
        typer.echo(pretty(got.body))
        return DONE
    rows = [
        {
            "id": pin.id,
            "owner": pin.owner,
            "model": pin.model or "unknown",
            "chunks": pin.chunks,
            "tier": pin.tier,
            "instances": pin.instances,
            "until": clock(pin.until_s),
        }
        for pin in got.value.pins
    ]
    columns = ["id", "owner", "model", "chunks", "tier", "instances", "until"]
    table(rows, columns, empty="no pins")
    return DONE


_NO_TIER = {"tier": "", "used": "", "of": "", "pinned": "", "available": ""}


def _tier_row(tier: Tier) -> dict[str, Any]:
    return {
        "tier": tier.name,
        "used": size(tier.used_bytes),
        "of": size(tier.capacity_bytes) if tier.capacity_bytes else "no limit",
        "pinned": size(tier.pinned_bytes) if tier.pinned_bytes else "",
        "available": "yes" if tier.available else f"no: {tier.reason or 'its breaker is open'}",
    }


def _hits(instance: Instance) -> str:
    """Share of the last minute's tokens that were found."""
    asked = instance.rates.requested_tokens
    return f"{min(instance.rates.hit_tokens / asked, 1):.0%}" if asked else ""


def _show_instance(one: Instance) -> None:
    rates = one.rates
    facts(
        [
            ("name", one.name),
            ("kind", one.kind),
            ("state", f"{one.state}, seen {ago(one.seen_s)}"),
            ("version", one.version),
            ("backends", ", ".join(f"{name} {version}" for name, version in one.backends.items())),
            ("process", f"{one.pid}, up {duration(one.uptime_s)}, incarnation {one.incarnation}"),
            ("models", ", ".join(one.models)),
            ("channel", one.channel),
            ("node server", one.node),
            ("engines", ", ".join(one.workers)),
            ("tokens asked for", f"{rates.requested_tokens:,.0f}/s, {_hits(one) or '0%'} found"),
            ("tokens stored", f"{rates.stored_tokens:,.0f}/s"),
            ("below host", f"{size(rates.read_bytes)}/s read, {size(rates.write_bytes)}/s written"),
            ("errors", counts(one.errors)),
        ]
    )
    rows = [
        _tier_row(tier)
        | {"chunks": f"{tier.chunks:,}", "writable": tier.writable, "url": tier.url or "memory"}
        for tier in one.tiers
    ]
    columns = ["tier", "used", "of", "pinned", "chunks", "available", "writable", "url"]
    table(rows, columns, empty="no tiers of its own")
