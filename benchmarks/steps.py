"""What a step costs that loads and stores nothing: both halves of the connector, 8 requests that
decode, embedded and on a node server.

    python benchmarks/steps.py [--out build/bench.json] [--rounds 15]

Needs vLLM's environment; no engine runs: requests and scheduler outputs are plain objects.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from figures import Figure, interleave, median, save, show, spread
from node import serving, settings

from lmcache_core.cache import Cache, EmbeddedCache
from lmcache_core.integrations.vllm.geometry import Geometry, Group
from lmcache_core.integrations.vllm.scheduler import Scheduler
from lmcache_core.integrations.vllm.worker import Worker
from lmcache_core.keys import Namespace
from lmcache_core.node.client import connect
from lmcache_core.opening import open_chunks

REQUESTS, PROMPT, STEPS, LIMIT_US = 8, 700, 200, 50.0
BLOCK, CHUNK, PAGE_BYTES = 16, 256, 64
PAYLOAD_BYTES = CHUNK // BLOCK * PAGE_BYTES
GROUP = Group.of(
    index=0, layers=1, block_size=BLOCK, page_bytes=PAGE_BYTES, window=None, chunk_size=CHUNK
)
GEOMETRY = Geometry.of(
    [GROUP], chunk_size=CHUNK, hit_step=BLOCK, parts=1, workers=1, description=b"bench"
)


def request(number: int) -> Any:
    return SimpleNamespace(
        request_id=f"r{number}",
        all_token_ids=[number] * (PROMPT + STEPS),
        num_tokens=PROMPT,
        num_prompt_tokens=PROMPT,
        skip_reading_prefix_cache=False,
        prompt_embeds=None,
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        kv_transfer_params=None,
        trace_headers=None,
    )


class Steps:
    """Requests that have stored their prompts, and go on decoding the same token."""

    def __init__(self, cache: Cache) -> None:
        self.scheduler = Scheduler(
            cache, namespace=Namespace.of({"model": "bench"}), geometry=GEOMETRY
        )
        self.worker = Worker(cache.config, [(GROUP, ["layer"])])
        self.worker.register({"layer": torch.zeros((64, PAGE_BYTES), dtype=torch.uint8)})
        self.ids = [f"r{i}" for i in range(REQUESTS)]
        for i in range(REQUESTS):
            one = request(i)
            self.scheduler.arrived(one)
            while self.scheduler.matched_tokens(one, 0)[0] is None:
                cache.wait(0.01)
        self.run_one(PROMPT)
        while self.scheduler.has_pending_work():
            self.run_one()

    def run_one(self, scheduled: int = 1) -> None:
        """What both runners call in one step."""
        computed = 0 if scheduled > 1 else PROMPT
        cached = SimpleNamespace(
            req_ids=self.ids,
            num_computed_tokens=[computed] * REQUESTS,
            new_block_ids=[None] * REQUESTS,
        )
        tables = ([*range(1, PROMPT // BLOCK + 2)],)
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(self.ids, scheduled),
            total_num_scheduled_tokens=REQUESTS * scheduled,
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda req_id: tables),
            kv_cache_block_copies=None,
        )
        meta = self.scheduler.build_metadata(output)
        worker = self.worker
        worker.handle_step(meta)
        worker.start_loads(meta.loads)
        worker.start_stores(meta.stores)
        worker.finished_loads(), worker.failed_loads(), worker.failed_blocks()
        report, _ = worker.report(), worker.stats()
        self.scheduler.update(SimpleNamespace(kv_connector_worker_meta=report))  # type: ignore[arg-type]
        self.scheduler.has_pending_work()
        self.scheduler.stats()

    def run(self) -> None:
        for _ in range(STEPS):
            self.run_one()


def measure(rounds: int) -> list[Figure]:
    config = settings(PAYLOAD_BYTES, 256)
    layout = GEOMETRY.kinds[0].layout
    with serving(config) as (socket, _):
        node = connect(settings(PAYLOAD_BYTES, 256, node=socket, node_reply_timeout_s=5), [layout])
        embedded = EmbeddedCache(open_chunks(config), [layout])
        sides = {"embedded": Steps(embedded), "node": Steps(node)}
        runs: dict[str, Callable[[], object]] = {name: side.run for name, side in sides.items()}
        times = interleave(runs, rounds)
        for side in sides.values():
            side.scheduler.close()
    return [
        Figure(
            f"steps.idle_{name}", median(seconds) / STEPS * 1e6, "us", None, None, LIMIT_US,
            median(seconds) / STEPS * 1e6 <= LIMIT_US, spread(seconds),
            f"both halves' hooks of a step of {REQUESTS} decoding requests, nothing to move",
        )
        for name, seconds in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    save(measure(args.rounds), args.out)
    show(args.out)


if __name__ == "__main__":
    main()
