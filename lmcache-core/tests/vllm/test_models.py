"""Every sort of attention that vLLM pages: what comes back gives the tokens of the run without
a cache, from host and from disk, also when copies are late."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Engine, cached, random_tokens

from lmcache_core.integrations.vllm.pages import CpuPages

PROMPT = random_tokens(31, 1400)
BRANCH = PROMPT[:300] + random_tokens(32, 500)
LONGER = PROMPT + random_tokens(33, 300)


@pytest.fixture(scope="session", params=["gqa", "mha", "sliding", "hybrid"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")


def answers(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Tokens of each prompt, one after the other, and how many each had cached."""
    outputs = []
    for prompt in prompts:
        outputs.append(engine.run([prompt], max_tokens=24)[0])
        if engine.llm.llm_engine.vllm_config.kv_transfer_config is not None:
            engine.settle()
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, [int(output.num_cached_tokens) for output in outputs]


def test_what_comes_back_equals_the_run_without_a_cache(
    model: Path, start: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPT, BRANCH, LONGER]
    reference, _ = answers(start(model), prompts)
    offload = CpuPages.offload

    def late(self: CpuPages, arena: Any, spans: Any) -> None:
        """Still reading when the next step starts: only the fence keeps the pages."""
        time.sleep(0.05)
        offload(self, arena, spans)

    monkeypatch.setattr(CpuPages, "offload", late)
    engine: Engine = start(model, extra)
    tokens, hits = answers(engine, prompts)
    assert tokens == reference
    assert hits == [0, 256, 1280]
    tokens, hits = answers(engine, prompts)
    assert tokens == reference
    assert hits == [1280, 768, 1536]
    assert all(chunk.pins == 0 for chunk in engine.cache.host._chunks.values())

    again: Engine = start(model, extra)
    outputs = [again.run([prompt], max_tokens=24)[0] for prompt in prompts]
    assert [list(o.outputs[0].token_ids) for o in outputs] == reference
    assert cached(outputs[0]) == {"disk": 1280}


def test_latents_of_mla(tmp_path: Path, start: Any, extra: dict[str, Any]) -> None:
    """vLLM's MLA on CPUs without AMX can't prefill behind cached tokens, and its decoding differs
    from its prefill.  So what is loaded is only decoded behind: a prompt of whole blocks that was
    answered, and the first token of the answer, go on with the rest of that answer."""
    model = tiny_models.deepseek(tmp_path / "mla")
    first, other = random_tokens(34, 1280), random_tokens(35, 1000)
    (told, reference), _ = answers(start(model), [first, other])
    engine: Engine = start(model, extra)
    assert answers(engine, [first, other]) == ([told, reference], [0, 0])
    more = [*first, told[0]]
    tokens, hits = answers(engine, [more, other])
    assert (tokens[0][:23], tokens[1]) == (told[1:], reference)
    assert hits == [1280, 0]
    again: Engine = start(model, extra)
    tokens, hits = answers(again, [more, other])
    assert (tokens[0][:23], tokens[1]) == (told[1:], reference)
    assert hits == [1280, 0]
