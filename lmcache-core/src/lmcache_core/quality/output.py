"""A report as files: codecs.json and codecs.png."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lmcache_core.quality.report import Report

_MARKS = "os^Dv<>P*X"


def as_json(report: Report) -> str:
    """One object, indented."""
    return json.dumps(dataclasses.asdict(report), indent=1)


def write(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write both files; their paths.

    Raises:
        OSError: they can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data, picture = directory / "codecs.json", directory / "codecs.png"
    data.write_text(as_json(report) + "\n", encoding="utf-8")
    _plot(report, picture)
    return data, picture


def _plot(report: Report, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    trade, layers = figure.subplots(1, 2)
    _plot_trade(report, trade)
    _plot_layers(report, layers)
    figure.suptitle(
        f"{Path(report.model).name}: {report.windows} windows of {report.context_tokens} tokens "
        f"of context, {report.predicted_tokens} predicted ({report.text}, {report.dtype})"
    )
    figure.savefig(file, dpi=120)


def _plot_trade(report: Report, axes: Any) -> None:
    """Ratio against perplexity change, with two standard errors."""
    for number, row in enumerate(report.rows):
        axes.errorbar(
            row.ratio,
            100 * row.perplexity_change,
            yerr=200 * row.perplexity_change_error,
            fmt=_MARKS[number % len(_MARKS)],
            capsize=3,
            label=_name(row.codec, row.level),
        )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlim(left=0.9)
    axes.set_xlabel(f"ratio against {report.dtype}")
    axes.set_ylabel("perplexity change, % (bars: 2 standard errors)")
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_layers(report: Report, axes: Any) -> None:
    """Error of each layer; exact ones have no line."""
    for number, errors in enumerate(report.layers):
        if not any(errors.keys) and not any(errors.values):
            continue
        name, colour = _name(errors.codec, errors.level), f"C{number}"
        axes.plot(errors.keys, color=colour, label=f"{name} keys")
        axes.plot(errors.values, color=colour, linestyle="--", label=f"{name} values")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("error (rms of differences / rms of values)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)


def _name(codec: str, level: str) -> str:
    return f"{codec} {level}".strip()
