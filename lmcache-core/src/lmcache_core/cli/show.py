"""What every command of ``lmc`` prints alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmcache_core.sdk import LMCacheError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def fail(error: LMCacheError) -> NoReturn:
    """Say what is wrong and what helps, and exit with 2."""
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
    raise typer.Exit(2)


def show_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Print ``columns`` of ``rows`` as a table, or whole rows as JSON."""
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table()
    for column in columns:
        # Folded, not cut: commands are there to be copied.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(row[column])) for column in columns))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
