"""What makes a function a fleet command: shared options, and exit codes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import typer

from lmcache_core.cli.fleet_link import Fleet
from lmcache_core.cli.fleet_options import chosen, connect
from lmcache_core.cli.fleet_text import plain
from lmcache_core.controller.messages import Selection
from lmcache_core.sdk import BackendUnavailable, LMCacheError

DONE = 0
FAILED = 1
REFUSED = 2
AWAY = 3
RUNNING = 4
INTERRUPTED = 130

ASKED = "Exit codes: 0 answered; 2 wrong command line, token or request; 3 no controller answers."
WORKED = (
    "Exit codes: 0 done; 1 failed, or done in part; 2 wrong command line, token or request; "
    "3 no controller answers; 4 still running after --timeout-s; 130 Ctrl-C: the job goes on."
)
PANEL = "Fleet, through a controller"
_SHARED: dict[object, Callable[..., Any]] = {Fleet: connect, Selection: chosen}


def command(
    app: typer.Typer, *, examples: str, exits: str
) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Register a function, which returns its exit code, under its name.

    In the place of a parameter of type `Fleet` or `Selection` the command has the options of
    `connect` or `chosen`.
    """

    def register(function: Callable[..., int]) -> Callable[..., None]:
        asked = inspect.signature(function, eval_str=True).parameters
        shared = {
            name: (_SHARED[found.annotation], inspect.signature(_SHARED[found.annotation]))
            for name, found in asked.items()
            if found.annotation in _SHARED
        }

        @functools.wraps(function)
        def run(**options: Any) -> None:
            _call(function, shared, options)

        parameters = [found for name, found in asked.items() if name not in shared]
        for build, _ in shared.values():
            parameters += inspect.signature(build, eval_str=True).parameters.values()
        named = [found.replace(kind=inspect.Parameter.KEYWORD_ONLY) for found in parameters]
        # Typer reads both; what wraps() left of the function would be found first.
        del run.__wrapped__  # type: ignore[attr-defined]
        run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        run.__annotations__ = {found.name: found.annotation for found in named}
        app.command(epilog=f"Examples:  {examples}\n\n{exits}", rich_help_panel=PANEL)(run)
        return run

    return register


def _call(
    function: Callable[..., int],
    shared: dict[str, tuple[Callable[..., Any], inspect.Signature]],
    options: dict[str, Any],
) -> None:
    """Call ``function`` with what ``options`` name, and exit as it ends.

    Raises:
        typer.Exit: always.
    """
    fleet: Fleet | None = None
    try:
        for name, (build, signature) in shared.items():
            built = build(**{option: options.pop(option) for option in signature.parameters})
            options[name] = built
            fleet = built if isinstance(built, Fleet) else fleet
        raise typer.Exit(function(**options))
    except BackendUnavailable as error:
        complain(error)
        raise typer.Exit(AWAY) from error
    except LMCacheError as error:
        complain(error)
        raise typer.Exit(REFUSED) from error
    except KeyboardInterrupt:
        if fleet is not None and fleet.unanswered:
            typer.echo("interrupted before an answer came: `lmc jobs` shows what runs", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if fleet is not None:
            fleet.close()


def complain(error: LMCacheError) -> None:
    """Say what is wrong, and what helps: a line each."""
    typer.echo(f"error: {plain(error.message)}", err=True)
    if error.hint:
        typer.echo(f"hint: {plain(error.hint)}", err=True)
