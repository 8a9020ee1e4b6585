"""Time to first token on real vLLM: no cache, vLLM's prefix cache, its OffloadingConnector
with a file tier, and lmcache-core; 2,048 shared tokens and a tail of 16 of its own.

    python benchmarks/ttft.py --model build/models/SmolLM2-135M-Instruct [--rounds 3]

Every mode runs in processes of its own, interleaved by round; within one, each prompt set
has its own document.  First token = add_request to the first output token, one OMP thread.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure, median, save, show, spread
from first_token import ask, tell, told

SHARED, TAIL, SETS = 2048, 16, 3


def transfer(mode: str, directory: str) -> dict[str, Any] | None:
    if mode == "ours":
        tiers = [{"host": "1GiB"}, {"url": f"file://{directory}", "size": "4GiB"}]
        return {
            "kv_connector": "LMCacheCoreConnector",
            "kv_connector_extra_config": {"chunk_size": 256, "tiers": tiers},
        }
    if mode == "native":
        return {
            "kv_connector": "OffloadingConnector",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": 1 << 30,
                "spec_module_path": "native_on_cpu",
                "spec_name": "NumpyTierSpec",
                "secondary_tiers": [{"type": "fs", "root_dir": directory}],
            },
        }
    return None


def child(mode: str, phase: str, model: str, directory: str) -> None:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {}
    if (config := transfer(mode, directory)) is not None:
        options["kv_transfer_config"] = KVTransferConfig(kv_role="kv_both", **config)
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=2304,
        enable_prefix_caching=mode == "prefix_cache",
        **options,
    )
    engine = llm.llm_engine
    number = 0

    def ask_next(ids: list[int], tokens: int = 8) -> dict[str, Any]:
        nonlocal number
        number += 1
        return ask(engine, f"r{number}", ids, tokens)

    rng = random.Random(5)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 4000) for _ in range(count)]

    documents = [ids(SHARED) for _ in range(SETS)]
    tails = [[ids(TAIL) for _ in range(3)] for _ in range(SETS)]
    ask_next(ids(96), 2)
    results = []
    for document, (cold, warm, again) in zip(documents, tails):
        asked = [cold, warm] if phase == "first" else [again]
        for tail in asked:
            results.append(ask_next(document + tail))
            ask_next(ids(32), 4)
            time.sleep(0.3)
            ask_next(ids(32), 2)
    tell(results, engine)


def run(mode: str, phase: str, model: str, directory: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--child", mode, phase, "--model", model]
    here = str(Path(__file__).parent)
    return list(told([*command, "--directory", directory], 300, PYTHONPATH=here))


def measure(model: str, rounds: int, modes: list[str]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    reference: dict[int, list[int]] = {}
    for i in range(rounds):
        for mode in modes[i % len(modes) :] + modes[: i % len(modes)]:
            directory = tempfile.mkdtemp(prefix=f"ttft-{mode}-")
            first = run(mode, "first", model, directory)
            names = ["cold", "warm"] * SETS
            if mode in ("ours", "native"):
                first += run(mode, "again", model, directory)
                names += ["disk"] * SETS
            shutil.rmtree(directory)
            for position, (name, row) in enumerate(zip(names, first)):
                if name == "warm" and mode != "none":
                    assert row["cached"] >= SHARED, (mode, name, row["cached"])
                if name == "disk":
                    assert row["cached"] >= SHARED, (mode, name, row["cached"])
                assert row["tokens"] == reference.setdefault(position, row["tokens"]), (mode, name)
                seconds.setdefault(f"{mode}.{name}", []).append(row["ttft"])
            print(f"round {i + 1}/{rounds} {mode}: " + ", ".join(
                f"{n} {median(v):.3f} s" for n, v in seconds.items() if n.startswith(mode)
            ), flush=True)  # fmt: skip
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default="prefix_cache,ours,native")
    parser.add_argument("--directory", default="")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.model, args.directory)
        return
    seconds = measure(args.model, args.rounds, args.modes.split(","))
    middle = {name: median(values) for name, values in seconds.items()}
    prefix, cold = middle["prefix_cache.warm"], middle["prefix_cache.cold"]
    method = f"{SHARED} shared + {TAIL} own tokens, fp32, 1 thread, medians of {args.rounds}x{SETS}"
    rows = [
        ("ttft.warm_host", "ours.warm", prefix, 1.15, "over vLLM's own prefix-cache hit"),
        ("ttft.warm_host_over_cold", "ours.warm", cold, 0.05, "over cold"),
        ("ttft.new_process_disk_over_cold", "ours.disk", cold, 0.05, "over cold"),
    ]
    peers = {"vllm_prefix_cache": prefix, "cold": cold}
    figures = []
    for name, ours, limit, target, what in rows:
        native = middle.get("native." + ours.partition(".")[2])
        ratio = middle[ours] / limit
        figures.append(
            Figure(
                name=name, value=middle[ours], unit="s", limit=limit, ratio=ratio,
                target=target, met=ratio <= target, spread=spread(seconds[ours]),
                method=f"{method}; ratio {what}",
                peer={**peers, **({"vllm_offloading": native} if native else {})},
            )
        )  # fmt: skip
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
