"""Decode steps of real vLLM while the store below host stands still.

    python benchmarks/stall.py --model build/models/tiny-llama [--stall-s 10]

One engine decodes; a Redis behind a proxy is its lower tier.  For ``--stall-s`` seconds the
proxy forwards nothing, while chunks go on being stored and new prompts are looked up.  The
figure is the median decode step during the stall over the median before and after it.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

from figures import Figure, median, save, show, spread

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Decoding:
    """Four requests that decode for ever; every second a fifth brings a prompt."""

    def __init__(self, model: Path, url: str) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        tiers = [{"host": "256MiB"}, {"url": url, "deadline_s": 2.0, "threads": 4}]
        transfer = KVTransferConfig(
            kv_connector="LMCacheCoreConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"chunk_size": 256, "tiers": tiers},
        )
        self.engine = LLM(
            model=str(model), dtype="float32", enforce_eager=True, max_model_len=4096,
            max_num_seqs=8, enable_prefix_caching=False, kv_transfer_config=transfer, seed=0,
        ).llm_engine  # fmt: skip
        self._rng = random.Random(0)
        self._count = 0
        self._next_s = 0.0

    def add(self, prompt_tokens: int, tokens: int) -> None:
        from vllm import SamplingParams

        self._count += 1
        prompt = {"prompt_token_ids": [self._rng.randrange(3, 900) for _ in range(prompt_tokens)]}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self.engine.add_request(f"r{self._count}", prompt, params)

    def steps(self, seconds: float) -> list[float]:
        """Durations of the steps that only decode, in so many seconds."""
        found: list[float] = []
        end_s = time.perf_counter() + seconds
        scheduler: Any = self.engine.engine_core.engine_core.scheduler
        while (start_s := time.perf_counter()) < end_s:
            if len(scheduler.running) < 4:
                self.add(64, 3000)
            if start_s > self._next_s:
                self._next_s = start_s + 1.0
                self.add(600, 1)
            waiting = bool(scheduler.waiting) or bool(scheduler.deferred_waiting)
            prefilling = any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.running)
            self.engine.step()
            if not (waiting or prefilling) and len(scheduler.running) == 4:
                found.append(time.perf_counter() - start_s)
        return found


def main() -> None:
    from lmcache_backend_redis.server import RedisServer
    from lmcache_conformance import FaultProxy

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--stall-s", type=float, default=10.0)
    args = parser.parse_args()
    with RedisServer() as server, FaultProxy(server.socket_path) as proxy:
        decoding = Decoding(args.model, f"redis://127.0.0.1:{proxy.port}")
        decoding.steps(5.0)
        before = decoding.steps(args.stall_s / 2)
        proxy.faults.stalled = True
        during = decoding.steps(args.stall_s)
        proxy.faults.stalled = False
        decoding.steps(2.0)
        after = decoding.steps(args.stall_s / 2)
        decoding.engine.engine_core.shutdown()
    ratio = median(during) / median([*before, *after])
    figure = Figure(
        name="stall.decode_step",
        value=median(during) * 1e3,
        unit="ms",
        limit=median([*before, *after]) * 1e3,
        ratio=ratio,
        target=1.05,
        met=ratio <= 1.05,
        spread=spread(during),
        method=f"median of {len(during)} decode steps of 4 requests while Redis stands still for "
        f"{args.stall_s:.0f} s, over {len(before) + len(after)} before and after",
    )
    save([figure], args.out)
    show(args.out)


if __name__ == "__main__":
    main()
