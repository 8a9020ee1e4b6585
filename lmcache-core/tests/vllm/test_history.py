"""Why each chunk of a request missed, as a controller asks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, random_tokens

pytestmark = pytest.mark.slow
PROMPT = random_tokens(78, 1300)


def ask(engine: Engine, name: str, prompt: list[int], salt: str | None = None) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    asked: dict[str, Any] = {"prompt_token_ids": prompt}
    if salt:
        asked["cache_salt"] = salt
    llm = engine.llm.llm_engine
    llm.add_request(name, asked, params)
    while llm.has_unfinished_requests():
        llm.step()
    engine.settle()
    return engine.connector.scheduler.explain(name)


def reasons(rows: list[Any]) -> list[str]:
    return [row.reason for row in rows]


def test_every_chunk_has_its_reason(
    start: Callable[..., Engine], llama: Path, extra: dict[str, Any]
) -> None:
    engine = start(llama, extra)
    assert reasons(ask(engine, "new", PROMPT)) == ["never_stored"] * 5
    rows = ask(engine, "again", PROMPT)
    assert reasons(rows) == [""] * 5
    assert {row.detail for row in rows} == {"loaded"}
    assert reasons(ask(engine, "salted", PROMPT, "tenant")) == ["identity.tenant_salt"] * 5
    assert engine.connector.scheduler.explain("nobody") is None


def test_a_gap_in_the_middle_tells_what_went_and_what_is_not_needed(
    start: Callable[..., Engine], llama: Path, extra: dict[str, Any]
) -> None:
    engine = start(llama, {**extra, "tiers": [{"host": "64MiB"}]})
    keys = [row.key for row in ask(engine, "new", PROMPT)]
    cache = engine.cache
    cache.note_gone("host", keys[2:3], "lru")
    cache.host.drop(keys[2:3])
    rows = ask(engine, "gap", PROMPT)
    assert reasons(rows) == ["", "", "evicted", "not_needed", "not_needed"]
    assert rows[2].detail == "host lru" and rows[2].at_s > 0
