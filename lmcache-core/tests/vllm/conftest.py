"""A tiny random Llama and real vLLM engines on the CPU backend, one at a time."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

collect_ignore: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.fspath).startswith(here):
            item.add_marker(pytest.mark.vllm)


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(count)]


def save_llama(path: Path, *, seed: int = 0) -> Path:
    """The demo's tiny random Llama."""
    from lmcache_core.demo.models import save_tiny_llama

    save_tiny_llama(path, seed=seed)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


class Engine:
    """An `LLM` with helpers that show what the connector did."""

    def __init__(self, model: Path, extra: dict[str, Any] | None, **kwargs: Any) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        policy = kwargs.pop("kv_load_failure_policy", "recompute")
        options: dict[str, Any] = dict(
            model=str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=4096,
            enable_prefix_caching=False,
            max_num_seqs=8,
            seed=0,
            max_num_batched_tokens=512,
            skip_tokenizer_init=True,
        )
        options.update(kwargs)
        if extra is not None:
            options["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMCacheCoreConnector",
                kv_role="kv_both",
                kv_load_failure_policy=policy,
                kv_connector_extra_config=extra,
            )
        self.llm = LLM(**options)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def connector(self) -> Any:
        return self.core.scheduler.connector

    @property
    def cache(self) -> Any:
        """The `ChunkEngine` behind the scheduler's connector."""
        return self.connector.scheduler.cache.engine

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def run(
        self, prompts: list[Any], max_tokens: int = 12, logprobs: int | None = None
    ) -> list[Any]:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=logprobs,
            detokenize=False,
        )
        return self.llm.generate(asked, params, use_tqdm=False)

    def tokens(self, prompts: list[Any], max_tokens: int = 12) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in self.run(prompts, max_tokens)]

    def settle(self) -> None:
        """Step as the engine's own loop does: until confirmations, writes to lower tiers and
        requests that were aborted while they loaded are over."""
        import time

        end = time.monotonic() + 10
        while self.core.scheduler.has_requests() and time.monotonic() < end:
            self.core.step()
            time.sleep(0.001)
        assert not self.core.scheduler.has_requests()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def cached(output: Any) -> dict[str, int]:
    """Tokens of an output by the tier that they came from, as the connector says."""
    return dict(output.kv_transfer_params["lmcache"]["cached_tokens"])


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Start engines; all are shut down at the end, and before the next one starts."""
    live: list[Engine] = []

    def starter(model: Path, extra: dict[str, Any] | None = None, **kwargs: Any) -> Engine:
        while live:
            live.pop().close()
        # An engine that was refused at start leaves its connector in vLLM's global.
        from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

        ensure_kv_transfer_shutdown()
        gc.collect()
        engine = Engine(model, extra, **kwargs)
        live.append(engine)
        return engine

    yield starter
    while live:
        live.pop().close()
    gc.collect()


@pytest.fixture
def extra(tmp_path: Path) -> dict[str, Any]:
    return {
        "chunk_size": 256,
        "tiers": [
            {"host": "256MiB"},
            {"url": f"file://{tmp_path}/kv", "size": "512MiB"},
        ],
    }
