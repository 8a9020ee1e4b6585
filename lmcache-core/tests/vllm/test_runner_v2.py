"""The call shape of vLLM's Model Runner V2, which runs on accelerators only: its own
`ActiveKVConnector` takes the place of the first runner's calls in a live CPU engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from conftest import Engine, random_tokens

PROMPTS = [random_tokens(81, 900), random_tokens(82, 700)]


class FakeRunner:
    """Makes the second runner's calls around each forward pass of the first one."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

        # Its constructor registers pages, which the first runner has done.
        self.active = ActiveKVConnector.__new__(ActiveKVConnector)
        self.active.vllm_config = vllm_config
        self.active._pending_load_kwargs, self.active._disabled = None, False
        self.kwargs: list[set[str]] = []

    @contextmanager
    def step(self, scheduler_output: Any, defer_finalize: bool = False) -> Iterator[Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group
        from vllm.v1.outputs import KVConnectorOutput

        self.active.kv_connector = connector = get_kv_transfer_group()
        start = type(connector).start_load_kv

        def start_load_kv(forward_context: Any, **kwargs: Any) -> None:
            self.kwargs.append(set(kwargs))
            start(connector, forward_context, **kwargs)

        connector.start_load_kv = start_load_kv
        batch = None
        if scheduler_output.total_num_scheduled_tokens:
            ids = list(scheduler_output.num_scheduled_tokens)
            batch = SimpleNamespace(idx_mapping=[], req_ids=ids, num_tokens=len(ids))
        self.active.pre_forward(scheduler_output, batch, {} if batch else None)
        output = KVConnectorOutput()
        yield output
        self.active.finish_forward()
        found = self.active.post_forward(scheduler_output.finished_req_ids)
        assert found is not None
        for name in KVConnectorOutput.__dataclass_fields__:
            setattr(output, name, getattr(found, name))


@pytest.mark.parametrize("kind", ["gqa", "hybrid"])
@pytest.mark.parametrize("load", ["sync", "async"])
def test_the_second_runners_calls_give_the_same_answers(
    kind: str,
    load: str,
    tmp_path: Path,
    start: Any,
    extra: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

    model = tiny_models.MODELS[kind](tmp_path / "model")
    plain: Engine = start(model)
    reference = plain.tokens(PROMPTS)
    engine: Engine = start(model, {**extra, "load": load})
    runner = FakeRunner(engine.llm.llm_engine.vllm_config)
    monkeypatch.setattr(KVConnectorModelRunnerMixin, "_get_kv_connector_output", runner.step)
    assert engine.tokens(PROMPTS) == reference
    engine.settle()
    outputs = engine.run(PROMPTS)
    assert [list(o.outputs[0].token_ids) for o in outputs] == reference
    assert [o.num_cached_tokens for o in outputs] == [768, 512]
    assert {"scheduler_output", "request_ids", "num_tokens", "attn_metadata"} in [
        kwargs - {"request_state_indices"} for kwargs in runner.kwargs
    ]
    engine.settle()
    assert all(chunk.pins == 0 for chunk in engine.cache.host._chunks.values())
