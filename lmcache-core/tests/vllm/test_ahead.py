"""A prefix moves to host while its request waits for its turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Engine, cached, random_tokens

pytestmark = pytest.mark.slow
Start = Callable[..., Engine]
FIRST, SECOND = random_tokens(31, 900), random_tokens(32, 900)


def watch_answers(engine: Engine) -> dict[str, list[int | None]]:
    """What the connector says of each request, in order."""
    answers: dict[str, list[int | None]] = {}
    ask = engine.connector.get_num_new_matched_tokens

    def asked(request: Any, computed: int) -> Any:
        answer = ask(request, computed)
        answers.setdefault(request.request_id.split("-")[0], []).append(answer[0])
        return answer

    engine.connector.get_num_new_matched_tokens = asked
    return answers


def test_a_request_that_waits_finds_its_prefix_in_host(
    start: Start, llama: Path, extra: dict[str, Any]
) -> None:
    start(llama, extra).run([SECOND])
    engine = start(llama, extra, max_num_seqs=1)
    answers = watch_answers(engine)
    outputs = engine.run([random_tokens(33, 200), SECOND])
    assert [cached(o) for o in outputs] == [{}, {"disk": 768}]
    assert list(answers.values())[1] == [768], "it had to ask again"


def test_an_abort_while_waiting_cancels_the_prefetch(
    start: Start, llama: Path, extra: dict[str, Any]
) -> None:
    from vllm import SamplingParams

    start(llama, extra).run([FIRST, SECOND])
    engine = start(llama, extra, max_num_seqs=1)
    vllm = engine.llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    for name, prompt in (("a", FIRST), ("b", SECOND)):
        vllm.add_request(name, {"prompt_token_ids": prompt}, params)
    vllm.abort_request(["b"])
    while vllm.has_unfinished_requests():
        vllm.step()
        time.sleep(0.001)
    engine.settle()
    host = engine.cache.host
    assert all(chunk.pins == 0 for chunk in map(host.get, host.keys()) if chunk is not None)
    assert engine.connector.scheduler._lookups.ahead_bytes == 0


def test_prefetching_ahead_is_bounded(start: Start, llama: Path, extra: dict[str, Any]) -> None:
    start(llama, extra).run([FIRST, SECOND])
    one = {**extra, "max_prefetch_bytes": 4 << 20}
    engine = start(llama, one, max_num_seqs=1)
    outputs = engine.run([FIRST, SECOND, FIRST])
    assert [sum(cached(o).values()) for o in outputs] == [768] * 3
    assert engine.cache.metrics.snapshot()["vllm.prefetch_not_ahead"] >= 1
