"""``lmc clear``, ``pin``, ``unpin``, ``move``, ``copy``, ``compress``, ``decompress``: change what
a fleet holds."""

from __future__ import annotations

import getpass
from typing import Annotated
from urllib.parse import quote

import typer

from lmcache_core.cli.fleet_command import WORKED, command
from lmcache_core.cli.fleet_confirm import may_clear
from lmcache_core.cli.fleet_jobs import (
    TimeoutS,
    Wait,
    Wish,
    complaints,
    follow,
    job_path,
    outcome,
    settle,
)
from lmcache_core.cli.fleet_link import Fleet
from lmcache_core.cli.fleet_options import make, of_prefix, place
from lmcache_core.cli.fleet_text import clock, counted, plain, pretty
from lmcache_core.cli.show import Json
from lmcache_core.controller.messages import (
    ClearRequest,
    Job,
    MoveRequest,
    Pin,
    PinRequest,
    RecodeRequest,
    Selection,
)

act_app = typer.Typer()
HOUR_S = 3600.0

InstanceNames = Annotated[
    list[str] | None,
    typer.Option("--instance", help="Only at this one; repeat for more.  Else everywhere."),
]
Source = Annotated[str, typer.Argument(metavar="FROM", help="INSTANCE/TIER that has it.")]
Target = Annotated[str, typer.Argument(metavar="TO", help="INSTANCE/TIER that is to have it.")]


@command(
    act_app,
    examples="lmc clear --text @prompt.txt   |   lmc clear --tenant-file salt --tier host   |   "
    "lmc clear --model llama --instance engine-0 --yes --json",
    exits=WORKED,
)
def clear(
    fleet: Fleet,
    select: Selection,
    instance: InstanceNames = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="Only there; repeat for more.  Else in every tier.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Delete chunks, also in stores that outlive a process, and those that are being stored.

    Says what would go and asks, on a terminal; a script gives --yes.  No is exit code 1.
    """
    where = {"instances": instance or [], "tiers": tier or []}
    request = make(ClearRequest, {"select": select, **where})
    if not yes:
        may_clear(fleet, request)
    job = fleet.post("/v1/clear", request, Job)
    return settle(fleet, job, Wish(wait, timeout_s, as_json))


@command(
    act_app,
    examples="lmc pin --text @system-prompt.txt --model llama --ttl-s 86400   |   "
    "lmc pin --tokens ids.json --instance engine-0 --tier host --owner ci",
    exits=WORKED,
)
def pin(
    fleet: Fleet,
    select: Selection,
    owner: Annotated[str, typer.Option(help="Who wants it; else this user.")] = "",
    ttl_s: Annotated[float, typer.Option(help="Seconds until it ends by itself.")] = HOUR_S,
    instance: Annotated[
        list[str] | None,
        typer.Option(help="Keep it here; repeat for more.  Else where some of it is."),
    ] = None,
    tier: Annotated[str, typer.Option(help="Keep it in this tier.")] = "host",
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Keep a prefix where it is wanted: eviction leaves it alone until the pin ends.

    Takes --tokens, --text or --keys.
    With --no-wait it prints the pin's id.
    """
    wanted = {"select": of_prefix(select), "owner": owner or _user(), "ttl_s": ttl_s, "tier": tier}
    request = make(PinRequest, {**wanted, "instances": instance or []})
    got = fleet.post("/v1/pins", request, Pin)
    found = got.value
    if as_json:
        typer.echo(pretty(got.body))
    elif not wait:
        typer.echo(plain(found.id))
    else:
        typer.echo(
            f"pin {plain(found.id)}: {counted(found.chunks, 'chunk')} in {plain(found.tier)} of "
            f"{plain(', '.join(found.instances)) or 'no instance'}, until {clock(found.until_s)}"
        )
    if not wait:
        return 0
    job = follow(fleet, fleet.get(job_path(found.job), Job), Wish(wait, timeout_s, False)).value
    for reason in complaints(job):
        typer.echo(f"error: {reason}", err=True)
    if job.state == "running":
        typer.echo(f"still bringing chunks there: lmc jobs {plain(job.id)} --wait", err=True)
    return outcome(job)


@command(act_app, examples="lmc unpin 7f3a   |   lmc unpin 7f3a --no-wait", exits=WORKED)
def unpin(
    fleet: Fleet,
    pin: Annotated[str, typer.Argument(metavar="PIN", help="Its id, as `lmc pins` shows it.")],
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """End a pin; its chunks stay until they are evicted."""
    job = fleet.delete(f"/v1/pins/{quote(pin, safe='')}", Job)
    return settle(fleet, job, Wish(wait, timeout_s, as_json))


@command(
    act_app,
    examples="lmc move engine-0/host engine-1/host --text @prompt.txt   |   "
    "lmc move engine-0/disk engine-0/remote --model llama --no-wait",
    exits=WORKED,
)
def move(
    fleet: Fleet,
    source: Source,
    target: Target,
    select: Selection,
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Move chunks to another tier or instance.  Only what has arrived is deleted at its source."""
    return _transfer("move", fleet, source, target, select, Wish(wait, timeout_s, as_json))


@command(
    act_app,
    examples="lmc copy engine-0/host engine-1/host --tokens ids.json   |   "
    "lmc copy engine-0/remote engine-0/host --model llama",
    exits=WORKED,
)
def copy(
    fleet: Fleet,
    source: Source,
    target: Target,
    select: Selection,
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Copy chunks to another tier or instance, such as to warm a new engine."""
    return _transfer("copy", fleet, source, target, select, Wish(wait, timeout_s, as_json))


@command(
    act_app,
    examples="lmc compress disk --codec zstd --model llama   |   "
    "lmc compress remote --codec cachegen --level high --all --no-wait",
    exits=WORKED,
)
def compress(
    fleet: Fleet,
    tier: Annotated[str, typer.Argument(help="Name of a tier below host.")],
    select: Selection,
    codec: Annotated[str, typer.Option(help="As `lmc codec` lists them.")],
    level: Annotated[str, typer.Option(help="One of the codec's own; else its default.")] = "",
    instance: InstanceNames = None,
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Store chunks of a tier compressed, in place."""
    how = {"tier": tier, "codec": codec, "level": level, "instances": instance or []}
    request = make(RecodeRequest, {"select": select, **how})
    job = fleet.post("/v1/compress", request, Job)
    return settle(fleet, job, Wish(wait, timeout_s, as_json))


@command(act_app, examples="lmc decompress disk --model llama", exits=WORKED)
def decompress(
    fleet: Fleet,
    tier: Annotated[str, typer.Argument(help="Name of a tier below host.")],
    select: Selection,
    instance: InstanceNames = None,
    wait: Wait = True,
    timeout_s: TimeoutS = HOUR_S,
    as_json: Json = False,
) -> int:
    """Store chunks of a tier as they are, without a codec."""
    request = make(RecodeRequest, {"select": select, "tier": tier, "instances": instance or []})
    job = fleet.post("/v1/decompress", request, Job)
    return settle(fleet, job, Wish(wait, timeout_s, as_json))


def _transfer(
    verb: str, fleet: Fleet, source: str, target: str, select: Selection, wish: Wish
) -> int:
    request = MoveRequest(select=select, source=place(source), target=place(target))
    return settle(fleet, fleet.post(f"/v1/{verb}", request, Job), wish)


def _user() -> str:
    """Of this process; a container may have none with a name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "lmc"
