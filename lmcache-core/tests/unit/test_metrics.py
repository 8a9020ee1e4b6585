"""Counters, gauges and histograms, and how they are shown outside."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scripted import Make, Pages, Scripted, make, prompt, stored, until

from lmcache_core.logs import EventLog
from lmcache_core.metrics import BUCKETS_S, MAX_SAMPLES, Deltas, Metrics, merge
from lmcache_core.prometheus import EngineCollector
from lmcache_core.sdk import BackendUnavailable
from lmcache_core.series import OTHER, SERIES, series_of, series_table

__all__ = ["make"]
ROOT = Path(__file__).parents[3]


def test_counting_from_many_threads_loses_nothing() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.counter("a.b").inc()
            metrics.histogram("h").observe(0.02)

    threads = [threading.Thread(target=count) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert metrics.snapshot() == {"a.b": 8000}
    histogram = metrics.histograms()["h"]
    assert sum(histogram.counts) == 8000
    assert histogram.sum_s == pytest.approx(160)
    assert len(histogram.take_samples()) == MAX_SAMPLES


def test_a_value_on_a_bound_belongs_to_that_bucket() -> None:
    metrics = Metrics()
    for seconds in (*BUCKETS_S, 99.0):
        metrics.histogram("h").observe(seconds)
    assert metrics.histograms()["h"].counts == [1] * (len(BUCKETS_S) + 1)


def test_deltas_tell_everything_once() -> None:
    metrics, level = Metrics(), [1.0]
    metrics.gauge("g", lambda: level[0])
    deltas = Deltas(metrics)
    metrics.counter("c").inc(3)
    metrics.histogram("h").observe(0.5)
    first = deltas.take()
    assert first == {"counters": {"c": 3}, "gauges": {"g": 1.0}, "samples": {"h": [0.5]}}
    assert deltas.take() == {"counters": {}, "gauges": {}, "samples": {}}
    metrics.counter("c").inc()
    level[0] = 2.0
    second = deltas.take()
    assert second == {"counters": {"c": 1}, "gauges": {"g": 2.0}, "samples": {}}
    assert merge(first, second) == {
        "counters": {"c": 4}, "gauges": {"g": 2.0}, "samples": {"h": [0.5]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "series", "labels"),
    [
        ("vllm.requested_tokens", "lmcache:num_requested_tokens", ()),
        ("vllm.hit_tokens.disk", "lmcache:num_hit_tokens", ("disk",)),
        ("miss.identity.tenant_salt", "lmcache_core:missed_chunks", ("identity.tenant_salt",)),
        ("redis.stored_bytes", "lmcache_core:tier_write_bytes", ("redis",)),
        ("redis.put.rejected", "lmcache_core:tier_failures", ("redis", "put", "rejected")),
        ("redis.dropped_queue.get", "lmcache_core:tier_events", ("redis", "dropped", "queue.get")),
        ("redis.breaker_opened", "lmcache_core:tier_events", ("redis", "breaker", "opened")),
        ("host.used_bytes", "lmcache:local_cache_usage", ()),
        ("something.new", "lmcache_core:events", ("something.new",)),
    ],
)
def test_names_outside(name: str, series: str, labels: tuple[str, ...]) -> None:
    found, values = series_of(name)
    assert (found.name, values) == (series, labels)


def test_series_have_one_kind_and_one_set_of_labels_each() -> None:
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {}
    for series in (*SERIES, OTHER):
        assert kinds.setdefault(series.name, (series.kind, series.labels)) == (
            series.kind,
            series.labels,
        )
        assert re.fullmatch(r"lmcache(_core)?:[a-z_]+", series.name)


def test_whatever_an_engine_counts_has_a_series_of_its_own(make: Make) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 3)
    engine.retrieve(tokens, Pages(1))
    engine.clear()
    value = bytearray(store._values[engine.keys(tokens)[0]])
    value[5000] ^= 1
    store._values[engine.keys(tokens)[0]] = bytes(value)
    engine.retrieve(tokens, Pages(1))
    store.raises = BackendUnavailable("gone")
    engine.retrieve(prompt(2, 2), Pages(2))
    engine.retrieve(prompt(3, 2), Pages(3))
    until(engine, lambda: engine.metrics.snapshot().get("t0.probes", 0) > 0)
    for seed in range(4, 9):
        engine.store(prompt(seed, 3), Pages(seed))
    names = engine.metrics.snapshot()
    assert {"t0.corrupt", "t0.breaker_opened", "t0.skipped_breaker", "host.evicted"} <= set(names)
    unnamed = [n for n in names if series_of(n)[0] is OTHER]
    assert unnamed == []


def test_prometheus_shows_an_engine(make: Make) -> None:
    engine = make(Scripted())
    tokens = stored(engine, 1, 3)
    engine.retrieve(tokens, Pages(1))
    engine.metrics.histogram("lookup_seconds").observe(0.02)
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine.metrics))
    text = generate_latest(registry).decode()
    samples = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["lmcache_core:tier_writes_total", ("tier", "t0")] == 3
    assert samples["lmcache:local_cache_usage",] == engine.host.used_bytes > 0
    assert samples["lmcache_core:tier_available", ("tier", "t0")] == 1
    assert samples["lmcache:time_to_lookup_bucket", ("le", "0.05")] == 1
    assert samples["lmcache:time_to_lookup_bucket", ("le", "0.01")] == 0
    assert samples["lmcache:time_to_lookup_count",] == 1


def test_log_lines_are_bounded_and_say_what_was_held_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    log = EventLog(lambda: now[0], interval_s=10, target=logging.getLogger("test.events"))
    for i in range(5):
        log.warn("store_dropped", request_id=f"r{i}")
    log.warn("breaker_opened", tier="redis")
    now[0] += 10
    log.warn("store_dropped", request_id="r9")
    assert [record.getMessage() for record in caplog.records] == [
        "store_dropped request_id=r0",
        "breaker_opened tier=redis",
        "store_dropped request_id=r9 suppressed=4",
    ]


def test_the_breaker_and_a_corrupt_chunk_are_logged(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    store = Scripted()
    engine = make(store)
    tokens = stored(engine, 1, 1)
    value = bytearray(store._values[engine.keys(tokens)[0]])
    value[5000] ^= 1
    store._values[engine.keys(tokens)[0]] = bytes(value)
    engine.retrieve(tokens, Pages(1))
    store.raises = BackendUnavailable("gone away")
    engine.retrieve(prompt(2, 1), Pages(2))
    store.raises = None
    until(engine, lambda: engine.tiers.readable[0].available)
    text = caplog.text
    assert re.search(r"chunk_corrupt tier=t0 why=\w+ key=[0-9a-f]{92}", text)
    assert re.search(r"breaker_opened tier=t0 reason=.*gone away", text)
    assert "breaker_closed tier=t0" in text


def test_residency_is_told_for_every_tier(make: Make) -> None:
    engine = make(Scripted(), host_chunks=2)
    told: list[tuple[str, bytes, bool]] = []
    engine.on_residency(lambda tier, key, present: told.append((tier, key, present)))
    first, second = prompt(1, 2), prompt(2, 2)
    engine.store(first, Pages(1))
    assert engine.flush(5)
    engine.store(second, Pages(2))
    assert engine.flush(5)
    engine.drop(engine.keys(second)[:1])
    until(engine, lambda: ("t0", engine.keys(second)[0], False) in told)
    held: dict[str, set[bytes]] = {"host": set(), "t0": set()}
    for tier, key, present in told:
        (held[tier].add if present else held[tier].remove)(key)
    assert held["host"] == set(engine.keys(second)[1:])
    assert held["t0"] == {*engine.keys(first), engine.keys(second)[1]}


def test_the_docs_show_the_table() -> None:
    assert series_table() in (ROOT / "docs" / "metrics.md").read_text()
