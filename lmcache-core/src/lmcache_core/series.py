"""How counters are shown outside: Prometheus names, labels and help, by dotted name.

Names of LMCache are used where they mean the same; docs/metrics.md shows the table.  A name
that no row matches comes out as ``lmcache_core:events{event=NAME}``, so nothing is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
_TIER = r"(?P<tier>[^.]+)\."
_OPS = "exists|get|put|delete"


@dataclass(frozen=True, slots=True)
class Series:
    """One Prometheus series.

    Attributes:
        pattern: of the dotted names that it shows; its groups are the labels.
        name: without the suffix that Prometheus gives a counter.
    """

    pattern: str
    name: str
    kind: Kind
    help: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the pattern's order."""
        return tuple(re.compile(self.pattern).groupindex)


_ROWS: tuple[tuple[str, str, Kind, str], ...] = (
    (r"vllm\.requested_tokens", "lmcache:num_requested_tokens", "counter",
     "Tokens of requests that were looked up"),
    (r"vllm\.hit_tokens\.(?P<tier>.+)", "lmcache:num_hit_tokens", "counter",
     "Tokens that were loaded instead of prefilled, by the tier that they came from"),
    (r"vllm\.stored_tokens", "lmcache:num_stored_tokens", "counter",
     "Tokens whose chunks reached the host tier"),
    (r"host\.evicted", "lmcache:local_cpu_evict_count", "counter",
     "Chunks that the host tier evicted"),
    (r"host\.used_bytes", "lmcache:local_cache_usage", "gauge", "Bytes in the host tier"),
    (r"lookup_seconds", "lmcache:time_to_lookup", "histogram",
     "Seconds from a request's first question to its decision"),
    (r"copy\.offload_seconds", "lmcache:time_to_store", "histogram",
     "Seconds that one copy from the device to the host tier took"),
    (r"copy\.onboard_seconds", "lmcache:time_to_retrieve", "histogram",
     "Seconds that one copy from the host tier to the device took"),
    (r"copy\.(?P<direction>offload|onboard)_bytes", "lmcache_core:copied_bytes", "counter",
     "Bytes copied between device and host tier"),
    (r"miss\.(?P<reason>.+)", "lmcache_core:missed_chunks", "counter",
     "Chunks that were asked for and not found, by the reason of the first of them"),
    (r"vllm\.not_cached\.(?P<reason>.+)", "lmcache_core:requests_not_cached", "counter",
     "Requests that can't be cached, by reason"),
    (r"vllm\.(?P<reason>store_failed|store_dropped_pressure|load_failed)",
     "lmcache_core:chunk_failures", "counter", "Chunks that were not stored or loaded"),
    (r"host\.(?P<reason>store_dropped|prefetch_no_room)", "lmcache_core:host_full", "counter",
     "Chunks for which the host tier had no room"),
    (r"host\.evicted_unwritten", "lmcache_core:evicted_unwritten_chunks", "counter",
     "Chunks that the host tier evicted before a tier with write: on_evict was offered them"),
    (r"host\.unwritten_chunks", "lmcache_core:unwritten_chunks", "gauge",
     "Chunks in the host tier that tiers with write: on_evict were not offered yet"),
    (r"host\.pinned_bytes", "lmcache_core:pinned_bytes", "gauge",
     "Bytes of the host tier that pins of controllers keep"),
    (r"pins\.(?P<event>.+)", "lmcache_core:pin_events", "counter", "Pins that ended by themselves"),
    (r"agent\.(?P<event>.+)", "lmcache_core:controller_link_events", "counter",
     "What links to controllers survived: failed syncs, gaps, questions without an answer"),
    (r"node\.sessions", "lmcache_core:node_sessions", "gauge",
     "Engines that a node server serves"),
    (r"node\.held_bytes", "lmcache_core:node_held_bytes", "gauge",
     "Host memory that these engines write and read"),
    (r"node\.connected", "lmcache_core:node_connected", "gauge",
     "1 while an engine has its node server, 0 while everything misses"),
    (r"node\.(?P<event>.+)", "lmcache_core:node_events", "counter",
     "What node servers and their clients survived: lost links, refused clients, dead sessions"),
    (r"(?P<direction>push|receive)\.bytes", "lmcache_core:transfer_bytes", "counter",
     "Payload bytes written into decoders, and received from prefillers"),
    (r"(?P<part>push|receive)\.ended\.(?P<reason>.+)", "lmcache_core:transfers", "counter",
     "Prompts that were pushed or received, by how that ended; whole is all of it"),
    (r"(?P<part>push|receive|lend|channel|transfer)\.(?P<event>.+)",
     "lmcache_core:transfer_events", "counter",
     "What engines sent each other and survived: chunks, loans, lost peers, refusals"),
    (_TIER + r"used_bytes", "lmcache_core:tier_used_bytes", "gauge",
     "Bytes that the tier holds, as far as we know"),
    (_TIER + r"available", "lmcache_core:tier_available", "gauge",
     "1 while requests may use the tier, 0 behind an open breaker"),
    (_TIER + r"stored_bytes", "lmcache_core:tier_write_bytes", "counter",
     "Bytes of acknowledged puts"),
    (_TIER + r"stored", "lmcache_core:tier_writes", "counter", "Acknowledged puts"),
    (_TIER + r"read_bytes", "lmcache_core:tier_read_bytes", "counter", "Bytes of verified gets"),
    (_TIER + r"evicted", "lmcache_core:tier_evicted", "counter", "Chunks deleted to make room"),
    (_TIER + r"corrupt", "lmcache_core:tier_corrupt", "counter",
     "Values that were not the bytes stored; deleted, and a miss"),
    (_TIER + rf"(?P<op>{_OPS})\.(?P<status>.+)", "lmcache_core:tier_failures", "counter",
     "Keys that were neither OK nor MISS, by operation and status"),
    (_TIER + r"(?P<event>dropped|skipped|breaker|probes|overdue|cancelled|error|close|lost|"
     r"corrupt)(?P<detail>.*)", "lmcache_core:tier_events", "counter",
     "What the tier survived: dropped calls, open breakers, probes, errors"),
)  # fmt: skip
SERIES = tuple(Series(*row) for row in _ROWS)
OTHER = Series(r"(?P<event>.+)", "lmcache_core:events", "counter", "Everything else, by name")


def series_of(name: str) -> tuple[Series, tuple[str, ...]]:
    """The series that shows the dotted ``name``, and its label values."""
    for series in SERIES:
        match = re.fullmatch(series.pattern, name)
        if match is not None:
            values = (match[label] for label in series.labels)
            return series, tuple(value.strip("._") for value in values)
    return OTHER, (name,)


def series_table() -> str:
    """The table of docs/metrics.md."""
    lines = ["| series | kind | labels | |", "|---|---|---|---|"]
    for series in (*SERIES, OTHER):
        labels = ", ".join(series.labels)
        lines.append(f"| `{series.name}` | {series.kind} | {labels} | {series.help} |")
    return "\n".join(lines) + "\n"
