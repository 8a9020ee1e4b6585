"""``lmc``: what is installed, whether this machine is fit, and what is configured."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lmcache_core.cli.backends import backend_rows
from lmcache_core.cli.codec import codec_app
from lmcache_core.cli.config import key_rows, key_table, setting_rows, settings_from
from lmcache_core.cli.controller import EPILOG as CONTROLLER_EPILOG
from lmcache_core.cli.controller import controller
from lmcache_core.cli.doctor import examine
from lmcache_core.cli.fleet import fleet_app
from lmcache_core.cli.init import render, write
from lmcache_core.cli.pd_proxy import EPILOG as PD_PROXY_EPILOG
from lmcache_core.cli.pd_proxy import pd_proxy
from lmcache_core.cli.serve import Serving, node_status, serve_node
from lmcache_core.cli.show import Json, fail, show_rows
from lmcache_core.sdk import LMCacheError
from lmcache_core.tokens import make_token

app = typer.Typer(
    help="KV cache for LLM serving: look at backends and at this machine.",
    no_args_is_help=True,
    add_completion=False,
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(codec_app, name="codec")
app.add_typer(fleet_app)
app.command("pd-proxy", epilog=PD_PROXY_EPILOG)(pd_proxy)
app.command("controller", epilog=CONTROLLER_EPILOG)(controller)


@app.command(epilog="Examples:  lmc backends   |   lmc backends --json | jq '.[].scheme'")
def backends(as_json: Json = False) -> None:
    """List installed backends: versions, schemes, capabilities, and whether they work here.

    Exits with 1 when one is broken.
    """
    rows = backend_rows()
    columns = ["scheme", "package", "version", "usable", "capabilities", "reason", "hint"]
    show_rows(rows, columns, as_json)
    raise typer.Exit(int(any(row["broken"] for row in rows)))


@app.command(epilog="Examples:  lmc doctor   |   lmc doctor --dir /nvme/kv --json")
def doctor(
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory that a disk tier would use.")
    ] = Path("/tmp"),
    as_json: Json = False,
) -> None:
    """Check this machine: Python, vLLM, memory limits, huge pages, disk, and every backend: what
    it lacks, and the command that installs it.

    Exits with 1 when a check fails; a warning does not.
    """
    rows = examine(directory)
    show_rows(rows, ["check", "state", "found", "hint"], as_json)
    raise typer.Exit(int(any(row["state"] == "fail" for row in rows)))


@config_app.command(epilog="Examples:  lmc config show   |   lmc config show --file kv.yaml --json")
def show(
    file: Annotated[
        Path | None, typer.Option(help="Read this file instead of LMCACHE_CONFIG_FILE.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print every effective value with its source: default, file or variable.

    What the engine is given as kv_connector_extra_config wins over these.
    """
    try:
        settings = settings_from(file, os.environ)
    except LMCacheError as error:
        fail(error)
    for text in settings.warnings:
        typer.echo(f"warning: {text}", err=True)
    show_rows(setting_rows(settings), ["key", "value", "source"], as_json)


@config_app.command(epilog="Examples:  lmc config keys   |   lmc config keys --markdown")
def keys(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the docs show it.")] = False,
    as_json: Json = False,
) -> None:
    """List LMCache 0.5.6's settings: mapped, refused or ignored here, and why."""
    if markdown:
        typer.echo(key_table(), nl=False)
        return
    show_rows(key_rows(), ["key", "fate", "note"], as_json)


@app.command(epilog="Examples:  lmc init   |   lmc init --dir /nvme/kv --out kv.yaml")
def init(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("lmcache.yaml"),
    directory: Annotated[Path, typer.Option("--dir", help="Directory of the disk tier.")] = Path(
        "lmcache-kv"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented configuration, sized for this machine."""
    try:
        write(out, render(directory), force=force)
    except LMCacheError as error:
        fail(error)
    transfer = (
        '{"kv_connector": "LMCacheCoreConnector", "kv_role": "kv_both", '
        '"kv_load_failure_policy": "recompute"}'
    )
    typer.echo(f"wrote {out}; serve with it:")
    path = shlex.quote(str(out.absolute()))
    typer.echo(f"  LMCACHE_CONFIG_FILE={path} vllm serve MODEL --kv-transfer-config '{transfer}'")


@app.command(
    epilog="Examples:  lmc serve --config kv.yaml   |   "
    "lmc serve --listen tcp://127.0.0.1:9250 --token-file kv.token"
)
def serve(
    file: Annotated[
        Path | None, typer.Option("--config", help="Read this file, not LMCACHE_CONFIG_FILE.")
    ] = None,
    socket: Annotated[str, typer.Option(help="Path of the unix socket; else the key node.")] = "",
    listen: Annotated[
        str, typer.Option(help="Also listen at tcp://HOST:PORT; asks for a token.")
    ] = "",
    token_file: Annotated[
        str, typer.Option(help="The token of --listen; made when it is not there.")
    ] = "",
    metrics: Annotated[
        str, typer.Option(help="Serve Prometheus metrics at HOST:PORT; PORT alone is local.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Serve one cache to every engine of this host, until SIGTERM.

    Then sessions may finish what they write, and so may the tiers below host; exits with 1 when
    that did not end well.  A second signal ends it at once.
    """
    try:
        settings = settings_from(file, os.environ)
        for text in settings.warnings:
            typer.echo(f"warning: {text}", err=True)
        wish = Serving(socket, listen, token_file, metrics, as_json)
        raise typer.Exit(serve_node(settings.config, wish))
    except LMCacheError as error:
        fail(error)


@app.command(epilog="Examples:  lmc node   |   lmc node --socket /run/lmcache/node.sock --json")
def node(
    socket: Annotated[str, typer.Option(help="Its address; else the key node.")] = "",
    token_file: Annotated[str, typer.Option(help="The token of a TCP address.")] = "",
    as_json: Json = False,
) -> None:
    """Show what a running node server does: its memory, tiers, sessions and counters."""
    try:
        config = settings_from(None, os.environ).config
        status = node_status(socket or config.node, token_file or config.node_token_file)
    except LMCacheError as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps(status, indent=1))
        return
    for rows in (status.pop("tiers"), status.pop("sessions")):
        if rows:
            show_rows(rows, list(rows[0]), False)
    counters = status.pop("counters")
    both = [*status.items(), *counters.items()]
    show_rows([{"what": name, "value": value} for name, value in both], ["what", "value"], False)


@app.command(epilog="Examples:  lmc token /run/lmcache/token   |   lmc token channel-token --json")
def token(
    file: Annotated[Path, typer.Argument(help="Is made, 0600, when it is not there.")],
    as_json: Json = False,
) -> None:
    """Make a token file for engines that meet over a channel, or check the one that is there.

    Every engine, node server and proxy that is to meet the others gets a copy.  The token itself is
    not shown.
    """
    there = file.exists()
    try:
        make_token(str(file))
    except LMCacheError as error:
        fail(error)
    if as_json:
        typer.echo(json.dumps({"file": str(file), "made": not there}))
    else:
        typer.echo(f"{file}: {'is good' if there else 'made'}")
