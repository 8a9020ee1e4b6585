"""``lmc codec``: which codecs are installed, and what they cost a model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmcache_core.cli.show import Json, fail, show_rows
from lmcache_core.codecs.registry import Codecs
from lmcache_core.sdk import CodecInfo, ConfigError, LMCacheError

if TYPE_CHECKING:
    from lmcache_core.quality import Choice, Plan, Report, Row

codec_app = typer.Typer(
    help="Look at codecs, and measure what they cost a model.", no_args_is_help=True
)


class Dtype(str, Enum):
    """Elements of keys and values."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Pages(str, Enum):
    """Whose pages."""

    cpu = "cpu"
    cuda = "cuda"


@codec_app.command("list", epilog="Examples:  lmc codec list   |   lmc codec list --json")
def list_codecs(as_json: Json = False) -> None:
    """List installed codecs: levels, bounds on their error, and whether they work here.

    A level's bound is the largest error of a layer that it lets pass (root mean square of the
    differences, divided by that of the values); a chunk over it is stored lossless.  Exits with 1
    when a codec is broken.
    """
    rows = codec_rows(Codecs())
    columns = ["codec", "lossless", "levels", "usable", "reason", "hint"]
    shown = rows if as_json else [{**row, "levels": _levels_text(row)} for row in rows]
    show_rows(shown, columns, as_json)
    raise typer.Exit(int(any(row["broken"] for row in rows)))


@codec_app.command(
    epilog="Examples:  lmc codec report build/models/SmolLM2-135M-Instruct   |   "
    "lmc codec report Qwen/Qwen3-0.6B --codec cachegen:low --codec zstd --windows 4 --json"
)
def report(
    model: Annotated[str, typer.Argument(help="Directory, or name on the Hub, of the model.")],
    codec: Annotated[
        list[str] | None,
        typer.Option(help="NAME or NAME:LEVEL; repeat for more.  Else all that are installed."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to predict, not the one shipped.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of codecs.json and codecs.png.")] = Path(
        "codec-report"
    ),
    windows: Annotated[int, typer.Option(help="Pieces of the text.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens of each that are encoded.")] = 1024,
    predicted: Annotated[int, typer.Option(help="Tokens that are predicted behind these.")] = 256,
    chunk: Annotated[int, typer.Option(help="Tokens in a chunk.")] = 256,
    block: Annotated[int, typer.Option(help="Tokens in a page of the engine.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Of keys and values.")] = Dtype.bfloat16,
    pages: Annotated[Pages, typer.Option(help="Layout of vLLM's pages.")] = Pages.cpu,
    as_json: Json = False,
) -> None:
    """Measure what each codec and level costs a model, and what it saves.

    The model reads windows of a text behind keys and values that went through the codec as they
    do on their way to a tier.  Shown are the ratio, the change of perplexity with its standard
    error, how often the most probable next token stays the same (greedy), the KL divergence of the
    next token's distribution, bytes of payload encoded and decoded a second on one thread, the
    largest error of a layer, and how many chunks the codec did not take.
    """
    from lmcache_core.quality import Plan

    try:
        plan = Plan(
            model=model,
            text=text,
            windows=windows,
            context_tokens=context,
            predicted_tokens=predicted,
            chunk_tokens=chunk,
            block_tokens=block,
            dtype=dtype.value,
            pages=pages.value,
        )
        _report(plan, codec or [], out, as_json)
    except LMCacheError as error:
        fail(error)


def _report(plan: Plan, wanted: list[str], out: Path, as_json: bool) -> None:
    from lmcache_core import quality
    from lmcache_core.quality import model, output

    if out.exists() and not out.is_dir():  # said now, not after minutes
        raise ConfigError(f"{out} is not a directory", hint="give --out a directory")
    model.require()
    codecs = Codecs()
    chosen, skipped = quality.choices(wanted, codecs)
    for name, error in skipped:
        typer.echo(f"warning: codec {name} is left out: {error.message}", err=True)
    found = _measured(plan, chosen, codecs)
    if as_json:
        typer.echo(output.as_json(found))
    else:
        _show_report(found)
    try:
        data, picture = output.write(found, out)
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}", hint="give --out another") from error
    typer.echo(f"wrote {data} and {picture}", err=True)


def _show_report(found: Report) -> None:
    shown = [_shown(row) for row in found.rows]
    show_rows(shown, list(shown[0]), False)
    typer.echo(f"MB/s of payload, encode/decode; perplexity without a codec {found.perplexity:.2f}")
    for row in found.rows:
        if row.stored_otherwise:
            name = f"{row.codec} {row.level}".strip()
            typer.echo(f"{name} did not take {row.stored_otherwise} of {found.chunks} chunks")


def _measured(plan: Plan, chosen: list[Choice], codecs: Codecs) -> Report:
    """The report, with a bar on stderr."""
    from lmcache_core.quality import make_report, steps_of

    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps_of(plan, chosen))
        started = False

        def on_step(what: str) -> None:
            nonlocal started
            progress.update(task, description=what, advance=int(started))
            started = True

        return make_report(plan, chosen, codecs, on_step=on_step)


def codec_rows(codecs: Codecs) -> list[dict[str, Any]]:
    """One row a codec, by name.

    ``broken``: it can't be a codec of this core; one that is whole and lacks a library is not.
    """
    return [_row(name, codecs) for name in codecs.names()]


def _row(name: str, codecs: Codecs) -> dict[str, Any]:
    row: dict[str, Any] = {"codec": name, "usable": False, "broken": False}
    none: dict[str, Any] = {"lossless": False, "levels": [], "max_error": {}}
    try:
        codec = codecs.get(name)
    except ConfigError as error:
        return {**row, **none, "broken": True, "reason": error.message, "hint": error.hint}
    row |= _facts(codec.info)
    try:
        codec.prepare()
    except ConfigError as error:
        return {**row, "reason": error.message, "hint": error.hint}
    except Exception as error:  # the boundary to foreign code
        return {**row, "broken": True, "reason": repr(error), "hint": ""}
    return {**row, "usable": True, "reason": "ready", "hint": ""}


def _facts(info: CodecInfo) -> dict[str, Any]:
    return {
        "version": info.version,
        "lossless": info.lossless,
        "needs_axes": info.needs_axes,
        "levels": [level for level in info.levels if level],
        "default_level": info.default_level,
        "max_error": dict(info.max_error),
    }


def _levels_text(row: dict[str, Any]) -> list[str]:
    """Each with its bound; the default one has a star."""
    bounds = row["max_error"]
    return [
        level
        + "*" * (level == row["default_level"])
        + (f" (<= {bounds[level]:g})" if bounds else "")
        for level in row["levels"]
    ]


def _shown(row: Row) -> dict[str, str]:
    """A row of the report as its table shows it, 80 columns wide."""
    change, error = 100 * row.perplexity_change, 100 * row.perplexity_change_error
    return {
        "codec": f"{row.codec} {row.level}".strip(),
        "ratio": f"{row.ratio:.2f}",
        "perplexity": f"{change:+.2f}±{error:.2f} %",
        "greedy": f"{100 * row.greedy_agreement:.1f} %",
        "KL": f"{row.logit_kl:.4f}",
        "MB/s": f"{row.encode_bytes_per_s / 1e6:.0f}/{row.decode_bytes_per_s / 1e6:.0f}",
        "error": f"{row.max_error:.3f}",
    }
