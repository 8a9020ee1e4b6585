"""What an engine goes through: speculation, resets, sleep, storms of preemptions and aborts on
a model of two kinds of attention, quantised pages, adapters.  Nothing stays pinned or parked,
nothing stale is served."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Engine, cached, random_tokens

PROMPT = random_tokens(41, 700)


def left_behind(engine: Engine) -> bool:
    """Whether anything is pinned, parked or tracked."""
    engine.settle()
    scheduler = engine.connector.scheduler
    pinned = any(chunk.pins for chunk in engine.cache.host._chunks.values())
    tracked = scheduler._lookups.live or scheduler._stores or scheduler._loading
    return bool(pinned or tracked or engine.core.scheduler.requests)


def test_what_was_decoded_comes_back_in_the_next_turn(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    plain: Engine = start(llama)
    answer = plain.tokens([PROMPT], max_tokens=120)[0]
    turn = [*PROMPT, *answer, *random_tokens(42, 30)]
    reference = plain.tokens([turn])[0]
    for store_decode, hit in ((True, 768), (False, 512)):
        engine: Engine = start(llama, {**extra, "store_decode": store_decode, "tiers": []})
        assert engine.tokens([PROMPT], max_tokens=120)[0] == answer
        engine.settle()
        (output,) = engine.run([turn])
        assert (list(output.outputs[0].token_ids), output.num_cached_tokens) == (reference, hit)


@pytest.fixture
def tame_numba() -> Iterator[None]:
    """vLLM's n-gram proposer loads numba, and the next engine's start trips over a lazy object
    of llvmlite."""
    yield
    import llvmlite.binding.ffi

    llvmlite.binding.ffi.lib._fntab["__dict__"] = {}


@pytest.mark.usefixtures("tame_numba")
def test_speculative_decoding_stores_no_rejected_token(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    """n-gram speculation on text that repeats itself: drafts are accepted and rejected."""
    pattern = random_tokens(43, 20)
    prompts = [pattern * 12, [*pattern[:7], *pattern * 13]]
    speculation = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    plain: Engine = start(llama, block_size=32)
    answers = plain.tokens(prompts, max_tokens=150)
    turns = [p + a + random_tokens(44, 9) for p, a in zip(prompts, answers)]
    reference = plain.tokens(turns)
    extra["chunk_size"] = 64
    engine: Engine = start(llama, extra, block_size=32, speculative_config=speculation)
    assert engine.tokens(prompts, max_tokens=150) == answers
    assert not left_behind(engine)
    outputs = engine.run(turns)
    assert [list(o.outputs[0].token_ids) for o in outputs] == reference
    assert all(o.num_cached_tokens >= len(p) + 64 for o, p in zip(outputs, prompts))
    assert not left_behind(engine)


def test_a_reset_with_the_connector_forgets_and_the_plain_one_does_not(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    engine: Engine = start(llama, extra)
    reference = engine.tokens([PROMPT])
    engine.settle()
    assert engine.llm.reset_prefix_cache()
    assert cached(engine.run([PROMPT])[0]) == {"host": 512}
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    (output,) = engine.run([PROMPT])
    assert ([list(output.outputs[0].token_ids)], output.num_cached_tokens) == (reference, 0)
    assert not left_behind(engine)
    assert cached(engine.run([PROMPT])[0]) == {"host": 512}, "the new epoch is cached"


def test_sleep_and_pause_leave_nothing_stale(
    llama: Path, start: Any, extra: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    engine: Engine = start(llama, extra)
    reference = engine.tokens([PROMPT])
    engine.settle()
    core, llm_engine = engine.core, engine.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    llm_engine.add_request("asleep", {"prompt_token_ids": PROMPT}, params)
    llm_engine.step()
    core.sleep(level=1)
    core.wake_up()
    llm_engine.abort_request(["asleep"])
    (output,) = engine.run([PROMPT])
    assert ([list(output.outputs[0].token_ids)], output.num_cached_tokens) == (reference, 0)
    assert not left_behind(engine)
    core.pause_scheduler(mode="keep", clear_cache=False)
    core.resume_scheduler()
    (output,) = engine.run([PROMPT])
    assert ([list(output.outputs[0].token_ids)], output.num_cached_tokens) == (reference, 512)
    assert not left_behind(engine)


def test_storms_of_preemptions_and_aborts_on_two_kinds_of_attention(
    tmp_path: Path, start: Any, extra: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    model = tiny_models.gemma3(tmp_path / "model")
    rng = random.Random(7)
    trunks = [random_tokens(50 + i, 400) for i in range(2)]
    prompts = [trunks[i % 2][: 100 + 40 * i] + random_tokens(60 + i, 60) for i in range(8)]
    plain: Engine = start(model)
    reference = [plain.tokens([prompt], max_tokens=60)[0] for prompt in prompts]
    extra["chunk_size"] = 128
    engine: Engine = start(model, extra, num_gpu_blocks_override=40, max_model_len=1024)
    preempted: list[int] = []
    scheduler = engine.core.scheduler
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *a, **k: (preempted.append(1), original(*a, **k))[1]
    llm_engine = engine.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    waiting = [(f"{turn}-{i}", i) for turn in range(3) for i in range(len(prompts))]
    rng.shuffle(waiting)
    aborted: set[str] = set()
    done: dict[str, Any] = {}
    while waiting or llm_engine.has_unfinished_requests():
        while waiting and len(scheduler.requests) < 6:
            name, i = waiting.pop()
            llm_engine.add_request(name, {"prompt_token_ids": prompts[i]}, params)
        for output in llm_engine.step():
            done[output.request_id] = output
        live = sorted(set(done) - aborted)
        if live and rng.random() < 0.02:
            victim = rng.choice(live)
            llm_engine.abort_request([victim])
            aborted.add(victim)
    hits = 0
    for name, output in done.items():
        if name not in aborted and output.finished:
            assert list(output.outputs[0].token_ids) == reference[int(name[2:])], name
            hits += output.num_cached_tokens
    assert preempted, "the test must preempt"
    assert hits > 500, "the traffic must hit"
    assert not left_behind(engine)


def test_quantised_pages_come_back(llama: Path, start: Any, extra: dict[str, Any]) -> None:
    options = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    plain: Engine = start(llama, **options)
    reference = plain.tokens([PROMPT])
    engine: Engine = start(llama, extra, **options)
    assert engine.tokens([PROMPT]) == reference
    engine.settle()
    assert cached(engine.run([PROMPT])[0]) == {"host": 512}
    engine = start(llama, extra)
    assert engine.run([PROMPT])[0].num_cached_tokens == 0, "pages of another dtype never meet"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        tiny_models.lora(tmp_path_factory.mktemp(f"lora{i}") / "same-name", seed=i)
        for i in range(2)
    ]


def test_adapters_of_one_name_and_other_content_never_meet(
    llama: Path, start: Any, extra: dict[str, Any], adapters: list[Path]
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    loras = [None, *(LoRARequest("same-name", i + 1, str(p)) for i, p in enumerate(adapters))]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)

    def ask(engine: Engine) -> list[tuple[list[int], int]]:
        found = []
        for lora in loras:
            asked: Any = {"prompt_token_ids": PROMPT}
            (output,) = engine.llm.generate([asked], params, lora_request=lora, use_tqdm=False)
            found.append((list(output.outputs[0].token_ids), output.num_cached_tokens))
        return found

    reference = [tokens for tokens, _ in ask(start(llama, **options))]
    assert len({tuple(tokens) for tokens in reference}) == 3, "the adapters must matter"
    engine: Engine = start(llama, extra, **options)
    assert ask(engine) == [(tokens, 0) for tokens in reference]
    engine.settle()
    assert ask(engine) == [(tokens, 512) for tokens in reference]
    # The second adapter is loaded over the first, under its number.
    swapped = LoRARequest("same-name", 1, str(adapters[1]), load_inplace=True)
    asked: Any = {"prompt_token_ids": PROMPT}
    (output,) = engine.llm.generate([asked], params, lora_request=swapped, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == reference[2]
    assert output.num_cached_tokens == 512, "by content it is the second adapter"
    assert not left_behind(engine)
