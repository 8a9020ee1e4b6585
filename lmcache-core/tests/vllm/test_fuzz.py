"""Random traffic under pressure: a host tier of a few chunks, few pages, aborts, resets.

Every answer must equal the run without a cache, and nothing may be left pinned.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, random_tokens

from lmcache_core.integrations.vllm.pages import CpuPages

CHUNK_BYTES = 4 * 4 * 2 * 64 * 64 * 4 // 2  # 4 layers x 4 blocks of 32 tokens, 2 heads, fp32


def traffic(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts out of a tree of shared prefixes, of many lengths."""
    trunks = [random_tokens(300 + i, 640) for i in range(3)]
    prompts = []
    for i in range(count):
        trunk = rng.choice(trunks)[: rng.randrange(40, 640)]
        prompts.append(trunk + random_tokens(1000 + i, rng.randrange(1, 200)))
    return prompts


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores still read their pages when the next steps start: only the fence saves them."""
    original = CpuPages.offload

    def slow(self: CpuPages, arena: Any, spans: Any) -> None:
        time.sleep(0.2)
        original(self, arena, spans)

    monkeypatch.setattr(CpuPages, "offload", slow)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, {"load": "async"}),
        (2, {"load": "sync"}),
        (3, {"load": "auto", "enable_prefix_caching": True}),
        (4, {"load": "async", "slow_copies": True}),
        (5, {"load": "async", "store_partial_chunk": True}),
        (6, {"load": "async", "write": "on_evict"}),
    ],
    ids=["async", "sync", "prefix-caching", "slow-copies", "partial-chunks", "on-evict"],
)
def test_random_traffic_under_pressure_equals_the_run_without_cache(
    tmp_path: Path,
    llama: Path,
    start: Any,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    options: dict[str, Any],
) -> None:
    from vllm import SamplingParams

    options = dict(options)
    if options.pop("slow_copies", False):
        slow_down(monkeypatch)
    write = options.pop("write", "through")
    rng = random.Random(seed)
    common: dict[str, Any] = dict(
        block_size=32, max_model_len=1024, max_num_batched_tokens=256, max_num_seqs=4
    )
    prompts = traffic(rng, 24)
    plain: Engine = start(llama, **common)
    reference = [plain.tokens([prompt], max_tokens=24)[0] for prompt in prompts]

    own = ("load", "store_partial_chunk")
    settings = {name: options.pop(name) for name in own if name in options}
    extra = {
        "chunk_size": 128,
        **settings,
        "write_ahead_bytes": 3 * (CHUNK_BYTES + 8192),
        "tiers": [
            {"host": f"{6 * (CHUNK_BYTES + 8192)}"},
            {
                "url": f"file://{tmp_path}/kv",
                "size": f"{10 * (CHUNK_BYTES + 8192)}",
                "write": write,
            },
        ],
    }
    engine: Engine = start(llama, extra, **common, **options, num_gpu_blocks_override=60)
    llm_engine, done = engine.llm.llm_engine, {}
    waiting = [(f"q{turn}-{i}", i) for turn in range(3) for i in range(len(prompts))]
    rng.shuffle(waiting)
    aborted: set[str] = set()
    live: set[str] = set()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    end = time.monotonic() + 120
    while waiting or llm_engine.has_unfinished_requests():
        assert time.monotonic() < end, "the engine does not get done"
        while waiting and len(live) < 6:
            name, i = waiting.pop()
            llm_engine.add_request(name, {"prompt_token_ids": prompts[i]}, params)
            live.add(name)
        for output in llm_engine.step():
            if output.finished:
                live.discard(output.request_id)
                done[output.request_id] = output
        if live and rng.random() < 0.01:
            victim = rng.choice(sorted(live))
            llm_engine.abort_request([victim])
            live.discard(victim)
            aborted.add(victim)
    engine.settle()
    cached = 0
    for name, output in done.items():
        if name not in aborted:
            i = int(name.partition("-")[2])
            assert list(output.outputs[0].token_ids) == reference[i], name
            cached += output.num_cached_tokens
    assert cached > 2000, "the traffic must hit"
    assert not engine.core.scheduler.requests
    scheduler, host = engine.connector.scheduler, engine.cache.host
    assert not (scheduler._lookups.live or scheduler._stores or scheduler._loading)
    assert all(chunk.pins == 0 for chunk in host._chunks.values())
    counted = engine.cache.metrics.snapshot()
    assert counted.get("host.evicted", 0) > 0, "the host tier must be under pressure"
    assert engine.cache.tiers.readable[0].used_bytes <= 10 * (CHUNK_BYTES + 8192)
