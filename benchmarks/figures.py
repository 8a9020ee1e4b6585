"""Figures of a benchmark run: medians of interleaved rounds, each beside its raw limit."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_GIB = 1 << 30


@dataclass
class Figure:
    """One measured value; `ratio` is to `limit` (or to the named peer), as `method` says."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    target: float | None
    met: bool | None
    spread: float
    method: str
    peer: dict[str, float] = field(default_factory=dict)


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, ``prepare`` before each untimed; the order turns."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prepare()
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Half the inter-quartile range over the median."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def paired_ratio(ours: list[float], raw: list[float]) -> float:
    """Median of the rounds' own ratios, so that a slow round slows both."""
    return statistics.median(a / b for a, b in zip(ours, raw))


def throughput(name: str, nbytes: int, times: dict[str, list[float]], target: float, method: str,
               **peers: str) -> Figure:  # fmt: skip
    """GiB/s of ``nbytes`` in each round of ``times["ours"]``, beside ``times["raw"]``; ``peers``
    names further runs and what they are shown as."""
    ratio = 1 / paired_ratio(times["ours"], times["raw"])
    return Figure(
        name=name,
        value=nbytes / _GIB / median(times["ours"]),
        unit="GiB/s",
        limit=nbytes / _GIB / median(times["raw"]),
        ratio=ratio,
        target=target,
        met=ratio >= target,
        spread=spread(times["ours"]),
        method=method,
        peer={label: nbytes / _GIB / median(times[key]) for key, label in peers.items()},
    )


def machine() -> dict[str, Any]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def save(figures: list[Figure], path: Path) -> None:
    """Write figures, replacing those of the same name that the file already has."""
    old: list[dict[str, Any]] = []
    if path.exists():
        old = json.loads(path.read_text())["figures"]
    names = {figure.name for figure in figures}
    rows = [row for row in old if row["name"] not in names] + [asdict(f) for f in figures]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "figures": rows}, indent=1) + "\n")


def show(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "raw limit", "peers", "ratio", "target", "met", "spread")
    for row in json.loads(path.read_text())["figures"]:
        peers = ", ".join(f"{name} {value:.3g}" for name, value in row["peer"].items())
        table.add_row(
            row["name"],
            f"{row['value']:.4g} {row['unit']}",
            "" if row["limit"] is None else f"{row['limit']:.4g}",
            peers,
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
            "" if row["target"] is None else f"{row['target']:.3g}",
            {True: "yes", False: "NO", None: ""}[row["met"]],
            f"{row['spread']:.1%}",
        )
    Console(width=150).print(table)
