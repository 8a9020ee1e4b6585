"""``lmc``: what is installed, and whether this machine is fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lmcache_core.cli.backends import backend_rows
from lmcache_core.cli.doctor import examine

app = typer.Typer(
    help="KV cache for LLM serving: look at backends and at this machine.",
    no_args_is_help=True,
    add_completion=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command(epilog="Examples:  lmc backends   |   lmc backends --json | jq '.[].scheme'")
def backends(as_json: Json = False) -> None:
    """List installed backends: versions, schemes, capabilities, and whether they work here.

    Exits with 1 when one is broken.
    """
    rows = backend_rows()
    columns = ["scheme", "package", "version", "usable", "capabilities", "reason"]
    _show(rows, columns, as_json)
    raise typer.Exit(int(any(row["broken"] for row in rows)))


@app.command(epilog="Examples:  lmc doctor   |   lmc doctor --dir /nvme/kv --json")
def doctor(
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory that a disk tier would use.")
    ] = Path("/tmp"),
    as_json: Json = False,
) -> None:
    """Check this machine: Python, vLLM, memory limits, huge pages, disk, backends.

    Exits with 1 when a check fails; a warning does not.
    """
    rows = examine(directory)
    _show(rows, ["check", "state", "found", "hint"], as_json)
    raise typer.Exit(int(any(row["state"] == "fail" for row in rows)))


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_text(row[column]) for column in columns))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
