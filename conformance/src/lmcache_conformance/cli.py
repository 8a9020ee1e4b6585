"""``lmcache-conformance``: judge a backend, codec or channel, check and compare certificates, start
a new backend."""

from __future__ import annotations

import atexit
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmcache_conformance import certificate, scaffold, waivers
from lmcache_conformance.channels import CHANNEL_CHECKS, Source, judge_channel
from lmcache_conformance.channels.judge import write as write_channel
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.codecs import CODEC_CHECKS, judge_codec
from lmcache_conformance.codecs.judge import write as write_codec
from lmcache_conformance.frame import Check, Outcome, Profile, Result
from lmcache_conformance.judge import Judge, find, harnesses, name_of
from lmcache_core.codecs.registry import Codecs
from lmcache_core.sdk import LMCacheError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
_COLOURS = {
    Outcome.PASS: "green", Outcome.FAIL: "bold red", Outcome.WAIVED: "yellow",
    Outcome.NOT_CLAIMED: "dim", Outcome.INCONCLUSIVE: "yellow",
}  # fmt: skip


@app.command()
def run(
    backend: Annotated[str, typer.Argument(help="name of an installed harness")],
    url: Annotated[str, typer.Option(help="judge the store at this URL, without a harness")] = "",
    full: Annotated[bool, typer.Option(help="the long plan, up to 15 minutes")] = False,
    report: Annotated[Path, typer.Option(help="where the certificate goes")] = Path(
        "build/certificates"
    ),
    require: Annotated[
        list[Profile] | None, typer.Option(help="exit by this profile alone; repeatable")
    ] = None,
    only: Annotated[str, typer.Option(help="ids such as B3,H4: no certificate")] = "",
    seed: Annotated[int | None, typer.Option(help="of everything random")] = None,
    known: Annotated[Path, typer.Option("--waivers", help="known failures")] = Path(waivers.FILE),
    as_json: Annotated[bool, typer.Option("--json", help="print the certificate")] = False,
) -> None:
    """Judge a backend.

    Examples:

        lmcache-conformance run redis

        lmcache-conformance run mine --full --require core --require resilient

        lmcache-conformance run mine --url mine://10.0.0.1:7000 --only B1,H4
    """
    wanted = {each.strip().upper() for each in only.split(",") if each.strip()}
    console = Console(stderr=as_json)
    with _errors():
        unknown = wanted - {check.id for check in CHECKS}
        if unknown:
            raise typer.BadParameter(f"no check is called {', '.join(sorted(unknown))}")
        waived = waivers.load(known, [check.id for check in CHECKS])
        judge = Judge(find(backend, url), full=full, waived=waived, seed=seed)
        try:
            results = _judge_all(judge, wanted, console)
            if wanted:
                _show(results, console)
                raise typer.Exit(any(each.outcome is Outcome.FAIL for each in results))
            found = judge.certificate()
        finally:
            judge.close()
    path = certificate.write(found, report)
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        _show(results, console)
        _profiles(found, console)
        console.print(f"certificate: {path}")
    missing = [each.value for each in require or [] if found.profiles[each.value] != "PASS"]
    if missing:
        console.print(f"[bold red]required, and not passed: {', '.join(missing)}")
    raise typer.Exit(bool(missing if require else found.totals["FAIL"]))


@app.command()
def codec(
    name: Annotated[str, typer.Argument(help="an installed codec")],
    report: Annotated[Path, typer.Option(help="where the certificate goes")] = Path(
        "build/certificates"
    ),
    seed: Annotated[int | None, typer.Option(help="of everything random")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the certificate")] = False,
) -> None:
    """Judge a codec.

    Examples:

        lmcache-conformance codec zstd

        lmcache-conformance codec mine --seed 7 --json
    """
    console = Console(stderr=True)
    with _errors():
        made = Codecs().get(name)
        made.prepare()
        found = judge_codec(made, seed=seed, told=partial(_tell, console))
    path = write_codec(found, report)
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        console.print(f"{found.verdict}; certificate: {path}")
    raise typer.Exit(found.verdict != Outcome.PASS.value)


@app.command()
def channel(
    name: Annotated[str, typer.Argument(metavar="SCHEME_OR_URL", help="an installed channel")],
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, of the channel's URL; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the certificate's file")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="shorten the long checks")] = False,
    seed: Annotated[int | None, typer.Option(help="of everything random")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the certificate")] = False,
) -> None:
    """Judge a transfer channel; the certificate goes to build/certificates unless told otherwise.

    Examples:

        lmcache-conformance channel tcp --quick

        lmcache-conformance channel nixl+ucx://127.0.0.1 --option max_peers=8 --seed 7
    """
    console = Console(stderr=True)
    pairs = [each.partition("=") for each in option or []]
    if not all(equals for _, equals, _ in pairs):
        raise typer.BadParameter("write --option NAME=VALUE")
    url = name if "://" in name else f"{name}://127.0.0.1"
    if pairs:
        url += ("&" if "?" in url else "?") + urlencode([(key, text) for key, _, text in pairs])
    with _errors():
        told = partial(_tell, console)
        found = judge_channel(Source(url), quick=quick, seed=seed, told=told)
    target = out or Path("build/certificates") / f"channel-{found.scheme}.json"
    path = write_channel(found, target)
    if as_json:
        sys.stdout.write(path.read_text())
    else:
        console.print(f"{found.verdict}; certificate: {path}")
    raise typer.Exit(found.verdict != Outcome.PASS.value)


@app.command()
def verify(files: Annotated[list[Path], typer.Argument(help="certificates")]) -> None:
    """Recompute a certificate's totals and profiles from its checks.

    Example: lmcache-conformance verify build/certificates/redis.json
    """
    bad = 0
    with _errors():
        for path in files:
            wrong = certificate.faults_of(certificate.read(path), CHECKS)
            bad += bool(wrong)
            typer.echo(f"{path}: {'adds up' if not wrong else 'does NOT add up'}")
            for line in wrong:
                typer.echo(f"  {line}")
    raise typer.Exit(bool(bad))


@app.command()
def matrix(files: Annotated[list[Path], typer.Argument(help="certificates")]) -> None:
    """Print certificates as one Markdown table.

    Example: lmcache-conformance matrix build/certificates/*.json
    """
    with _errors():
        rows = [
            certificate.row(certificate.read(path))
            for path in files
            if not path.name.endswith(".badge.json")
        ]
    typer.echo("\n".join([certificate.HEADER, *sorted(rows)]))


@app.command()
def checks(as_markdown: Annotated[bool, typer.Option("--markdown")] = False) -> None:
    """List every check with its rule and what to do when it fails."""
    if as_markdown:
        typer.echo(scaffold.reference())
        return
    table = Table("id", "profile", "rule", "when it fails")
    for check in (*CHECKS, *CODEC_CHECKS, *CHANNEL_CHECKS):
        table.add_row(check.id, check.profile.value, check.rule, check.fix)
    Console().print(table)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="short name, also the URL scheme")],
    folder: Annotated[Path, typer.Argument(help="where it goes; must not exist")],
) -> None:
    """Start a backend: package, entry points, harness and tests that pass.

    Example: lmcache-conformance new mystore ./lmcache-backend-mystore
    """
    with _errors():
        made = scaffold.write(name, folder)
    for path in made:
        typer.echo(path)
    typer.echo(f"now: pip install -e '{folder}[test]' && lmcache-conformance run {name}")


@app.command()
def backends() -> None:
    """List the installed harnesses."""
    for name, entry in sorted(harnesses().items()):
        typer.echo(f"{name:16} {entry.value}")


def _tell(console: Console, check: Check, result: Result) -> None:
    """One line for an answer, more when it is a FAIL."""
    text = f"[{_COLOURS[result.outcome]}]{result.outcome.value:8}[/] {check.id:4} {check.rule}"
    console.print(text, highlight=False)
    if result.outcome is Outcome.FAIL:
        console.print(f"     found: {result.reason}", markup=False, highlight=False)
        console.print(f"     fix:   {check.fix}", markup=False, highlight=False)
    elif result.reason:
        console.print(f"     {result.reason}", markup=False, highlight=False)


def _judge_all(judge: Judge, wanted: set[str], console: Console) -> list[Result]:
    planned = [check for check in judge.plan if not wanted or check.id in wanted]
    columns = (TextColumn("{task.description:40.40}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(planned))
        for check in planned:
            progress.update(task, description=f"{check.id} {check.name.replace('_', ' ')}")
            result = judge.run(check)
            results.append(result)
            progress.advance(task)
            if result.outcome is Outcome.FAIL:
                console.print(f"[bold red]FAIL[/] {check.id} {check.rule}", highlight=False)
                console.print(f"     found: {result.reason}", markup=False, highlight=False)
                console.print(f"     fix:   {check.fix}", markup=False, highlight=False)
                again = f"lmcache-conformance run {name_of(judge.harness)} --only {check.id}"
                console.print(f"     again: {again} --seed {result.seed}", highlight=False)
    return results


def _show(results: list[Result], console: Console) -> None:
    table = Table("check", "outcome", "s", "why")
    rules = {check.id: check.rule for check in CHECKS}
    for each in results:
        text = f"[{_COLOURS[each.outcome]}]{each.outcome.value}[/]"
        figures = ", ".join(f"{name}={value:g}" for name, value in (each.figures or {}).items())
        why = each.reason or figures or rules[each.id]
        table.add_row(each.id, text, f"{each.seconds:.1f}", why.replace("[", r"\["))
    console.print(table)


def _profiles(found: certificate.Certificate, console: Console) -> None:
    for profile, word in found.profiles.items():
        console.print(f"{profile:10} [{_COLOURS[Outcome(word)]}]{word}[/]")


class _errors:
    """A typed error becomes one line and exit code 2."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LMCacheError):
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2)
        if isinstance(error, KeyboardInterrupt):
            typer.echo("interrupted: no certificate", err=True)
            raise typer.Exit(130)


def main() -> None:
    """The program.  NIXL 1.5.1 crashes when the interpreter takes UCX down, after everything is
    written: with it loaded, the process ends without that."""
    try:
        app()
    except SystemExit as ended:
        if not any(name.startswith("nixl") for name in sys.modules):
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else bool(ended.code))


if __name__ == "__main__":
    main()
