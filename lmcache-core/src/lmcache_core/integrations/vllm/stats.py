"""Our metrics through vLLM's own channels: its log line and its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from lmcache_core.metrics import BUCKETS_S, Recent, merge
from lmcache_core.series import OTHER, SERIES, Series, series_of


class Stats(KVConnectorStats):
    """What happened since the last step; ``data`` is a `Recent`, or empty."""

    def __init__(self, data: Recent | dict[str, Any] | None = None) -> None:
        super().__init__(data=dict(data or {}))

    @property
    def recent(self) -> Recent:
        """``data`` with every part."""
        return {
            "counters": self.data.get("counters", {}),
            "gauges": self.data.get("gauges", {}),
            "samples": self.data.get("samples", {}),
        }

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> Stats:
        assert isinstance(other, Stats)
        return Stats(merge(self.recent, other.recent))

    def reduce(self) -> dict[str, int | float]:
        """Of an interval, for vLLM's log line."""
        counters = self.recent["counters"]

        def total(prefix: str) -> int:
            return sum(value for name, value in counters.items() if name.startswith(prefix))

        requested, hits = counters.get("vllm.requested_tokens", 0), total("vllm.hit_tokens.")
        return {
            "requested tokens": requested,
            "hit tokens": hits,
            "hit rate": round(hits / requested, 3) if requested else 0.0,
            "stored tokens": counters.get("vllm.stored_tokens", 0),
            "missed chunks": total("miss."),
            "corrupt": sum(v for name, v in counters.items() if name.endswith(".corrupt")),
            "breakers opened": sum(v for n, v in counters.items() if n.endswith(".breaker_opened")),
        }

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PromMetrics(KVConnectorPromMetrics):
    """Registers every series of `lmcache_core.series` with vLLM's labels before ours."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics = {series.name: self._register(series) for series in (*SERIES, OTHER)}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        recent = Stats(transfer_stats_data).recent
        for name, value in recent["counters"].items():
            self._child(name, engine_idx).inc(value)
        for name, level in recent["gauges"].items():
            self._child(name, engine_idx).set(level)
        for name, values in recent["samples"].items():
            child = self._child(name, engine_idx)
            for seconds in values:
                child.observe(seconds)

    def _register(self, series: Series) -> Any:
        kinds = {
            "counter": self._counter_cls,
            "gauge": self._gauge_cls,
            "histogram": self._histogram_cls,
        }
        options: dict[str, Any] = {
            "name": series.name,
            "documentation": series.help,
            "labelnames": [*self._labelnames, *series.labels],
        }
        if series.kind == "histogram":
            options["buckets"] = BUCKETS_S
        return kinds[series.kind](**options)

    def _child(self, name: str, engine_idx: int) -> Any:
        series, labels = series_of(name)
        values = [*self.per_engine_labelvalues[engine_idx], *labels]
        return self._metrics[series.name].labels(*values)
