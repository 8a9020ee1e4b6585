"""docs/grafana/lmcache-core.json asks for series that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.proxy.counts import Counts
from lmcache_core.series import OTHER, SERIES

ROOT = Path(__file__).parents[3]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs/grafana/lmcache-core.json").read_text())
PANELS: list[dict[str, Any]] = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
NAME = re.compile(r"\blmcache(?:_core)?:[a-z0-9_]+")
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
OURS = {series.name + suffix: series for series in (*SERIES, OTHER)
        for suffix in SUFFIXES[series.kind]}  # fmt: skip
ADDED = {"instance", "le"}
"""Labels that Prometheus adds."""


def said(text: str) -> set[str]:
    """Names that a process's own text of metrics gives its samples."""
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    return {name + suffix for name, kind in kinds.items()
            for suffix in (SUFFIXES[kind] if kind == "histogram" else ("",))}  # fmt: skip


def known() -> set[str]:
    """Every name that a process of the project shows."""
    metrics = pytest.importorskip("lmcache_core.controller.metrics")
    of_controller = set(metrics.SERIES_NAMES)
    histograms = {f"{name}_bucket" for name in of_controller if name.endswith("_seconds")}
    return {*OURS, *said(Counts().text({})), *of_controller, *histograms}


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard."""
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_series_exists() -> None:
    asked = {name for expr in expressions() for name in NAME.findall(expr)}
    assert len(asked) > 40
    assert asked - known() == set()
    assert "lmcache_core:tier_corrupt" not in known(), "counters have their suffix"


def test_every_expression_asks_for_a_series_of_the_chosen_instances() -> None:
    for expr in expressions():
        names = NAME.findall(expr)
        assert names, expr
        assert expr.count('instance=~"$instance"') == len(names), expr


def test_every_label_is_one_of_its_series() -> None:
    checked = 0
    for expr in expressions():
        names = NAME.findall(expr)
        if not all(name in OURS for name in names):
            continue
        labels = ADDED.union(*(OURS[name].labels for name in names))
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expr))))
        matched = set(re.findall(r"[{,]\s*(\w+)\s*(?:=|!)", expr))
        assert grouped | matched <= labels, expr
        checked += 1
    assert checked > 30


def test_every_series_of_an_engine_is_shown() -> None:
    asked = {OURS[n].name for e in expressions() for n in NAME.findall(e) if n in OURS}
    assert {series.name for series in (*SERIES, OTHER)} - asked == set()


def test_every_panel_says_what_it_is() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Hits and lookups", "Tiers", "Breakers and errors", "Transfers", "Node servers",
                    "pd-proxy", "Controller"]  # fmt: skip
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert DASHBOARD["schemaVersion"] >= 41


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"])
                 for y in range(box["y"], box["y"] + box["h"])}  # fmt: skip
        assert not taken & cells, panel["title"]
        taken |= cells


def test_variables_choose_data_source_and_instances() -> None:
    source, instance = DASHBOARD["templating"]["list"]
    assert source["name"] == "datasource"
    assert source["type"] == "datasource" and source["query"] == "prometheus"
    assert instance["multi"] and instance["includeAll"] and instance["allValue"] == ".*"
    chosen = re.search(r'__name__=~"([^"]+)"', instance["query"]["query"])
    assert chosen is not None
    assert all(re.fullmatch(chosen[1], name) for name in known())
