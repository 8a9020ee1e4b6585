"""An engine's metrics for prometheus-client: ``pip install lmcache-core[prometheus]``.

    REGISTRY.register(EngineCollector(engine.metrics))

vLLM needs none of this: its own endpoint shows the same series.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lmcache_core.metrics import BUCKETS_S, Histogram, Metrics
from lmcache_core.series import series_of

_FAMILIES = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class EngineCollector(Collector):
    """Collects one engine's metrics whenever it is scraped; thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Every series that has a value."""
        found: dict[str, Any] = {}
        values: dict[str, Any] = {**self._metrics.snapshot(), **self._metrics.gauges()}
        for name, value in [*values.items(), *self._metrics.histograms().items()]:
            series, labels = series_of(name)
            family = found.get(series.name)
            if family is None:
                made = _FAMILIES[series.kind](series.name, series.help, labels=series.labels)
                family = found[series.name] = made
            if isinstance(value, Histogram):
                family.add_metric(labels, _cumulative(value.counts), value.sum_s)
            else:
                family.add_metric(labels, value)
        yield from found.values()


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    total, buckets = 0, []
    for bound, count in zip([*map(str, BUCKETS_S), "+Inf"], counts):
        total += count
        buckets.append((bound, float(total)))
    return buckets
