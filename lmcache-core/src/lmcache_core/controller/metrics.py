"""What the controller counts, as Prometheus reads it."""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmcache_core.controller import plans

if TYPE_CHECKING:
    from lmcache_core.controller.core import Controller

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
_PREFIX = "lmcache_core:controller_"
_FAMILIES: tuple[tuple[str, str, str], ...] = (
    ("instances", "gauge", "Instances by state"),
    ("chunks", "gauge", "Chunks that differ, in the directory"),
    ("syncs_total", "counter", "What instances said"),
    ("resyncs_total", "counter", "How often an instance was asked to say all again"),
    ("refused_syncs_total", "counter", "What instances said and could not be"),
    ("names_dropped_total", "counter", "Models and namespaces named that there was no room for"),
    ("jobs", "gauge", "Jobs that are kept, by state"),
    ("pins", "gauge", "Pins that hold"),
    ("requests_total", "counter", "Requests by operation and status"),
    ("request_seconds", "histogram", "Seconds of a request, by operation"),
    ("state_errors_total", "counter", "Calls of the store that failed, by error"),
    ("errors_total", "counter", "Bugs that were survived"),
    ("in_flight", "gauge", "Requests now"),
)
SERIES_NAMES: tuple[str, ...] = tuple(_PREFIX + name for name, _, _ in _FAMILIES)


class Latency:
    """Requests of one controller, by operation.  Belongs to one event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_S) + 1))
        self.sums_s: Counter[str] = Counter()
        self.in_flight = 0

    def observe(self, operation: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests[operation, status] += 1
        self.buckets[operation][bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sums_s[operation] += seconds  # type: ignore[assignment]


def metrics_text(controller: Controller, latency: Latency) -> bytes:
    """Everything in Prometheus' text format."""
    registry = controller.registry
    states: Counter[str] = Counter({"live": 0, "lost": 0, "resyncing": 0})
    states.update(registry.state(record) for record in registry.records.values())
    jobs: Counter[str] = Counter({"running": 0, "done": 0, "failed": 0, "cancelled": 0})
    jobs.update(plans.state_of(job) for job in controller.jobs.all())
    values: dict[str, Mapping[str, float]] = {
        "instances": _by("state", states),
        "chunks": {"": len(controller.directory)},
        "syncs_total": {"": controller.counts["syncs"]},
        "resyncs_total": {"": controller.counts["resyncs"]},
        "refused_syncs_total": {"": controller.counts["refused"]},
        "names_dropped_total": _by("kind", {"model": 0, "namespace": 0} | controller.names.dropped),
        "jobs": _by("state", jobs),
        "pins": {"": len(controller.pins.all())},
        "requests_total": {
            f'{{operation="{name}",status="{status}"}}': count
            for (name, status), count in sorted(latency.requests.items())
        },
        "state_errors_total": _by("error", controller.documents.errors),
        "errors_total": {"": controller.counts["internal_error"]},
        "in_flight": {"": latency.in_flight},
    }
    lines: list[str] = []
    for name, kind, text in _FAMILIES:
        lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"]
        if kind == "histogram":
            lines += _histogram(_PREFIX + name, latency)
        else:
            lines += [f"{_PREFIX}{name}{labels} {value}" for labels, value in values[name].items()]
    return ("\n".join(lines) + "\n").encode()


def _by(label: str, counter: Mapping[str, int]) -> dict[str, float]:
    return {f'{{{label}="{name}"}}': count for name, count in sorted(counter.items())}


def _histogram(name: str, latency: Latency) -> list[str]:
    lines = []
    for operation, counts in sorted(latency.buckets.items()):
        total = 0
        for bound, count in zip([*map(str, BUCKETS_S), "+Inf"], counts):
            total += count
            lines.append(f'{name}_bucket{{operation="{operation}",le="{bound}"}} {total}')
        lines.append(f'{name}_sum{{operation="{operation}"}} {latency.sums_s[operation]}')
        lines.append(f'{name}_count{{operation="{operation}"}} {total}')
    return lines
