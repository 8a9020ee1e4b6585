"""A prompt is prefilled once and comes back from host and from disk, on real vLLM.

Rule of equality: greedy tokens equal the run without a cache in fp32; in bf16 up to the
first step whose top-2 gap in that run is below 0.1 logprob.  Hits are read from the
engine's scheduler (`num_cached_tokens`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, cached, random_tokens

PROMPTS = [random_tokens(1, 1500), random_tokens(2, 757)]
EXTENDED = PROMPTS[0] + random_tokens(3, 200)
HITS = [1280, 512]


def assert_same(reference: list[Any], outputs: list[Any], dtype: str) -> None:
    for ref, out in zip(reference, outputs):
        want, got = list(ref.outputs[0].token_ids), list(out.outputs[0].token_ids)
        sure = len(want)
        if dtype == "bfloat16":
            for step, choices in enumerate(ref.outputs[0].logprobs):
                top = sorted((c.logprob for c in choices.values()), reverse=True)
                if top[0] - top[1] < 0.1:
                    sure = step
                    break
        assert got[:sure] == want[:sure]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"block_size": 128}, id="block128"),
        pytest.param({"block_size": 64, "load": "async"}, id="block64-async"),
        pytest.param({"block_size": 32, "dtype": "bfloat16"}, id="block32-bf16"),
        pytest.param({"block_size": 128, "enable_prefix_caching": True}, id="prefix-caching"),
        pytest.param({"block_size": 128, "max_num_batched_tokens": 2048}, id="one-step-prefill"),
    ],
)
def test_warm_and_restart_equal_the_run_without_cache(
    llama: Path, start: Any, extra: dict[str, Any], options: dict[str, Any]
) -> None:
    options = dict(options)
    extra["load"] = options.pop("load", "auto")
    dtype = options.get("dtype", "float32")
    plain: Engine = start(llama, **options)
    reference = plain.run([*PROMPTS, EXTENDED], logprobs=2)

    engine: Engine = start(llama, extra, **options)
    cold = engine.run(PROMPTS, logprobs=2)
    assert [o.num_cached_tokens for o in cold] == [0, 0]
    engine.settle()
    if options.get("enable_prefix_caching"):
        assert engine.llm.reset_prefix_cache()
    warm = engine.run(PROMPTS, logprobs=2)
    assert [o.num_cached_tokens for o in warm] == HITS
    assert [cached(o) for o in warm] == [{"host": 1280}, {"host": 512}]
    extended = engine.run([EXTENDED], logprobs=2)
    assert_same(reference, [*cold, *extended], dtype)
    assert_same(reference, warm, dtype)
    engine.settle()

    again: Engine = start(llama, extra, **options)
    restart = again.run(PROMPTS, logprobs=2)
    assert [o.num_cached_tokens for o in restart] == HITS
    assert [cached(o) for o in restart] == [{"disk": 1280}, {"disk": 512}]
    assert_same(reference, [*restart, *again.run([EXTENDED], logprobs=2)], dtype)


def test_loaded_pages_are_the_stored_bytes(
    llama: Path, start: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from lmcache_core.integrations.vllm.pages import CpuPages

    moved: dict[str, set[bytes]] = {"offload": set(), "onboard": set()}
    for op in ("offload", "onboard"):
        original = getattr(CpuPages, op)

        def record(
            self: CpuPages, arena: Any, spans: Any, op: str = op, original: Any = original
        ) -> None:
            spans = list(spans)
            original(self, arena, spans)
            for slot, pages in self._pairs(arena, spans):
                assert np.array_equal(slot, pages)
                for layer in range(len(pages)):
                    moved[op].update(page.tobytes() for page in pages[layer])

        monkeypatch.setattr(CpuPages, op, record)
    engine: Engine = start(llama, extra)
    engine.run([PROMPTS[0]])
    engine.settle()
    engine.run([PROMPTS[0]])
    assert len(moved["onboard"]) == 4 * 10
    assert moved["onboard"] <= moved["offload"]


def test_a_whole_number_of_chunks_leaves_one_block_to_compute(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    prompt = random_tokens(4, 1024)
    engine: Engine = start(llama, extra)
    first = engine.run([prompt])
    engine.settle()
    second = engine.run([prompt])
    assert second[0].num_cached_tokens == 1024 - 128
    assert second[0].outputs[0].token_ids == first[0].outputs[0].token_ids


def test_the_last_chunk_is_stored_when_asked_for(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    prompt = random_tokens(6, 700)
    longer = [*prompt, *random_tokens(7, 300)]
    other = [*prompt[:650], *random_tokens(8, 50)]
    short = prompt[:150]
    plain: Engine = start(llama, block_size=32)
    reference = plain.tokens([prompt, longer, other, short])
    extra["store_partial_chunk"] = True
    engine: Engine = start(llama, extra, block_size=32)

    def hits(prompts: list[Any]) -> list[int]:
        outputs = [engine.run([p])[0] for p in prompts]
        assert [list(o.outputs[0].token_ids) for o in outputs] == reference[: len(prompts)]
        engine.settle()
        return [int(o.num_cached_tokens) for o in outputs]

    asked = [prompt, longer, other, short]
    assert hits(asked) == [0, 512, 512, 0]
    assert hits(asked) == [672, 992, 672, 128], "21, 31, 21 and 4 whole blocks"
    engine = start(llama, extra, block_size=32)
    assert hits(asked) == [672, 992, 672, 128]


def test_many_requests_at_once_share_a_prefix(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    shared = random_tokens(5, 1024)
    prompts = [shared + random_tokens(100 + i, 40 + i) for i in range(8)]
    plain: Engine = start(llama)
    reference = plain.tokens(prompts)
    engine: Engine = start(llama, extra)
    assert engine.tokens(prompts) == reference
    engine.settle()
    outputs = engine.run(prompts)
    assert [list(o.outputs[0].token_ids) for o in outputs] == reference
    assert all(o.num_cached_tokens == 1024 for o in outputs)
    engine.settle()
    assert all(c.pins == 0 for c in engine.cache.host._chunks.values())


def test_preempted_requests_come_back_right(llama: Path, start: Any, extra: dict[str, Any]) -> None:
    prompts = [random_tokens(200 + i, 300) for i in range(6)]
    plain: Engine = start(llama, block_size=32)
    reference = plain.tokens(prompts, max_tokens=150)
    engine: Engine = start(
        llama, extra, block_size=32, num_gpu_blocks_override=45, max_model_len=1024
    )
    preempted = []
    scheduler = engine.core.scheduler
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *a, **k: (preempted.append(1), original(*a, **k))[1]
    assert engine.tokens(prompts, max_tokens=150) == reference
    assert preempted, "the test must preempt"
    engine.settle()
    assert all(c.pins == 0 for c in engine.cache.host._chunks.values())


def test_aborted_requests_leave_nothing_behind(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    extra["load"] = "async"
    engine: Engine = start(llama, extra)
    engine.run([PROMPTS[0]])
    engine.settle()
    engine.connector.scheduler.cache.reset()
    llm_engine = engine.llm.llm_engine
    for steps in range(6):
        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
        llm_engine.add_request(f"abort-{steps}", {"prompt_token_ids": PROMPTS[0]}, params)
        for _ in range(steps):
            llm_engine.step()
        llm_engine.abort_request([r for r in engine.core.scheduler.requests], internal=True)
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
    engine.run([random_tokens(9, 40)])
    engine.settle()
    assert not engine.core.scheduler.requests
    assert not engine.connector.scheduler._lookups.live
    assert all(c.pins == 0 for c in engine.cache.host._chunks.values())
