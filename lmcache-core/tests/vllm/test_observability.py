"""What vLLM shows of us: stats, its Prometheus endpoint, KV cache events, why chunks miss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, cached, random_tokens

pytestmark = pytest.mark.slow
Start = Callable[..., Engine]
PROMPT = random_tokens(51, 700)


def collect(engine: Engine) -> list[Any]:
    """The stats of every step, as the scheduler takes them."""
    taken: list[Any] = []
    take = engine.connector.get_kv_connector_stats

    def watched() -> Any:
        stats = take()
        if stats is not None:
            taken.append(stats)
        return stats

    engine.connector.get_kv_connector_stats = watched
    return taken


def test_stats_of_steps_add_up(start: Start, llama: Path, extra: dict[str, Any]) -> None:
    engine = start(llama, extra)
    taken = collect(engine)
    engine.run([PROMPT])
    engine.settle()
    engine.run([PROMPT])
    engine.settle()
    total = taken[0]
    for stats in taken[1:]:
        total = total.aggregate(stats)
    counters = total.recent["counters"]
    assert counters["vllm.requested_tokens"] == 1400
    assert counters["vllm.hit_tokens.host"] == 512
    assert counters["vllm.stored_tokens"] == 512
    assert counters["miss.never_stored"] == 2
    assert len(total.recent["samples"]["lookup_seconds"]) == 2
    summary = total.reduce()
    assert (summary["requested tokens"], summary["hit tokens"]) == (1400, 512)
    assert summary["hit rate"] == pytest.approx(512 / 1400, abs=1e-3)


def test_why_chunks_miss_is_logged_per_request(
    start: Start, llama: Path, extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(llama, extra)
    with caplog.at_level(logging.DEBUG, "lmcache_core"):
        logging.getLogger("lmcache_core").addHandler(caplog.handler)
        engine.run([{"prompt_token_ids": PROMPT, "cache_salt": "one"}])
        engine.run([{"prompt_token_ids": PROMPT, "cache_salt": "two"}])
    assert "missed_chunks=2 reason=never_stored" in caplog.text
    assert "missed_chunks=2 reason=identity.tenant_salt" in caplog.text
    assert engine.cache.metrics.snapshot()["miss.identity.tenant_salt"] == 2


def test_events_follow_what_each_tier_holds(
    start: Start, llama: Path, extra: dict[str, Any]
) -> None:
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

    events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    engine = start(llama, extra, kv_events_config=events_config)
    published: list[Any] = []
    publisher = engine.core.scheduler.kv_event_publisher
    publisher.publish = lambda batch: published.extend(batch.events)
    engine.run([PROMPT])
    engine.settle()
    engine.run([random_tokens(52, 20)])
    ours = [e for e in published if isinstance(e, BlockStored) and e.block_size == 256]
    assert [(e.medium, e.ownership) for e in ours] == [
        ("CPU", None), ("CPU", None), ("STORAGE", "disk"), ("STORAGE", "disk"),
    ]  # fmt: skip
    first, second = ours[:2]
    assert (first.token_ids, second.token_ids) == (PROMPT[:256], PROMPT[256:512])
    assert first.parent_block_hash is None
    assert second.parent_block_hash == first.block_hashes[0]
    assert [e.block_hashes for e in ours[2:]] == [first.block_hashes, second.block_hashes]
    published.clear()
    engine.core.scheduler.reset_prefix_cache(reset_connector=True)
    engine.run([random_tokens(53, 20)])
    assert [type(e) for e in published if type(e) is AllBlocksCleared]


def test_without_events_nothing_is_collected(
    start: Start, llama: Path, extra: dict[str, Any]
) -> None:
    engine = start(llama, extra)
    assert cached(engine.run([PROMPT])[0]) == {}
    assert list(engine.connector.take_events()) == []
    assert engine.cache.host.on_change(b"any", True) is None
