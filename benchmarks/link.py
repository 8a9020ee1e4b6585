"""Time to first token on real vLLM from a Redis tier behind a slow link, as chunks lie there raw,
lossless, by CacheGen, and as the adaptive choice has it.

    python benchmarks/link.py --model build/models/SmolLM2-135M-Instruct [--speeds 100mbit,1gbit]

Needs root: Redis and the engines each have a network namespace, a veth pair between them, and
``tc ... tbf`` on both ends.  Every mode stores its documents in one process and is asked in a
new one, so that host holds nothing; the modes take turns at each speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import Figure, median, save, show, spread
from first_token import ask, tell, told

TOKENS, TAIL, DOCUMENTS = 2048, 16, 3
ADDRESS, PORT = "10.77.0.2", 6379
MODES: dict[str, dict[str, str]] = {
    "raw": {},
    "zstd": {"codec": "zstd"},
    "cachegen": {"codec": "cachegen"},
    "auto": {"codec": "cachegen", "codec_level": "auto"},
}


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


@contextmanager
def link() -> Iterator[tuple[str, str]]:
    """Namespaces of engines and of the store, joined."""
    near, far = (f"lmc{os.getpid()}{end}" for end in "ab")
    for name in (near, far):
        sh(f"ip netns add {name}")
    try:
        sh(f"ip link add v{near} type veth peer name v{far}")
        for name, host in ((near, 1), (far, 2)):
            sh(f"ip link set v{name} netns {name}")
            sh(f"ip -n {name} addr add 10.77.0.{host}/24 dev v{name}")
            sh(f"ip -n {name} link set v{name} up")
            sh(f"ip -n {name} link set lo up")
        yield near, far
    finally:
        for name in (near, far):
            sh(f"ip netns del {name}")


def limit(names: tuple[str, str], speed: str) -> None:
    """As fast as the machine is when ``speed`` is "unlimited"."""
    for name in names:
        subprocess.run(
            f"tc -n {name} qdisc del dev v{name} root".split(), stderr=subprocess.DEVNULL
        )
        if speed != "unlimited":
            sh(
                f"tc -n {name} qdisc add dev v{name} root tbf rate {speed} burst 256kb latency 400ms"
            )


@contextmanager
def redis(namespace: str, directory: str) -> Iterator[None]:
    options = f"--bind {ADDRESS} --port {PORT} --save  --appendonly no --dir {directory}"
    command = f"ip netns exec {namespace} redis-server {options} --protected-mode no"
    process = subprocess.Popen(command.split(" "), stdout=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        yield
    finally:
        process.terminate()
        process.wait()


def documents(model: str) -> list[list[int]]:
    """Token ids of consecutive parts of the text, one to warm up first."""
    from transformers import AutoTokenizer

    from lmcache_core.quality.plan import read_text

    ids = AutoTokenizer.from_pretrained(model)(read_text(None)[0])["input_ids"]
    return [ids[i * TOKENS : (i + 1) * TOKENS] for i in range(DOCUMENTS + 1)]


def child(mode: str, model: str) -> None:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    texts = documents(model)
    tier = {"url": f"redis://{ADDRESS}:{PORT}", "deadline_s": 120.0, **MODES[mode]}
    transfer = KVTransferConfig(
        kv_connector="LMCacheCoreConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "chunk_size": 256,
            "lookup_deadline_s": 120.0,
            "tiers": [{"host": "1GiB"}, tier],
        },
    )
    llm = LLM(
        model=model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=2304,
        enable_prefix_caching=False,
        kv_transfer_config=transfer,
    )
    engine = llm.llm_engine
    core = engine.engine_core.engine_core

    def settle() -> None:
        end = time.monotonic() + 300
        cache = core.scheduler.connector.scheduler.cache.engine
        while (core.scheduler.connector.has_pending_push_work() or cache.unsettled) and (
            time.monotonic() < end
        ):
            core.step()
            cache.poll()
            time.sleep(0.002)
        assert not cache.unsettled

    cache = core.scheduler.connector.scheduler.cache.engine
    ask(engine, "warm-up", texts[0][:64], 2)
    rows = []
    for number, text in enumerate(texts):
        tail = texts[(number + 1) % len(texts)][1000 : 1000 + TAIL]
        rows.append(ask(engine, f"d{number}", text + tail))
        settle()
    counts = {
        name.partition(".")[2]: value
        for name, value in cache.metrics.snapshot().items()
        if name.startswith("redis.") and value
    }
    tell({"rows": rows[1:], "counts": counts}, engine)


def run(namespace: str, mode: str, model: str) -> dict[str, Any]:
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, "--model", model]
    return dict(told([*command, "--child", mode], 580))


def measure(model: str, speeds: list[str], modes: list[str], rounds: int) -> dict[str, Any]:
    """speed -> mode -> {"ttft": [s], "cold": [s], "bytes": stored, "counts": ...}."""
    found: dict[str, Any] = {speed: {} for speed in speeds}
    with link() as ends:
        for speed in speeds:
            limit(ends, speed)
            for turn in range(rounds):
                for mode in modes[turn % len(modes) :] + modes[: turn % len(modes)]:
                    directory = tempfile.mkdtemp(prefix="link-")
                    with redis(ends[1], directory):
                        first = run(ends[0], mode, model)
                        again = run(ends[0], mode, model)
                    shutil.rmtree(directory)
                    row = found[speed].setdefault(mode, {"ttft": [], "cold": [], "same": []})
                    for cold, warm in zip(first["rows"], again["rows"]):
                        assert cold["cached"] == 0, (mode, speed, cold["cached"])
                        assert warm["cached"] == TOKENS, (mode, speed, warm["cached"])
                        row["cold"].append(cold["ttft"])
                        row["ttft"].append(warm["ttft"])
                        row["same"].append(cold["tokens"] == warm["tokens"])
                    row["bytes"] = first["counts"]["stored_bytes"]
                    row["counts"] = {
                        k: v for k, v in first["counts"].items() if k.startswith(("enc", "chosen"))
                    }
                    print(f"{speed} {mode}: first token {median(row['ttft']):.3f} s, cold "
                          f"{median(row['cold']):.3f} s, stored {row['bytes'] / 1e6:.1f} MB, same "
                          f"text {sum(row['same'])}/{len(row['same'])}, {row['counts']}",
                          flush=True)  # fmt: skip
    return found


def figures_of(found: dict[str, Any], rounds: int) -> list[Figure]:
    rows = []
    for speed, modes in found.items():
        raw = median(modes["raw"]["ttft"])
        for mode, row in modes.items():
            if mode == "raw":
                continue
            ours = median(row["ttft"])
            target = {"auto": 1.05, "cachegen": 0.4 if speed == "100mbit" else None}.get(mode)
            ratio = ours / raw
            rows.append(
                Figure(
                    name=f"link.{speed}.{mode}", value=ours, unit="s", limit=raw, ratio=ratio,
                    target=target, met=None if target is None else ratio <= target,
                    spread=spread(row["ttft"]),
                    method=f"first token after {TOKENS} + {TAIL} tokens, bf16, from Redis over "
                    f"{speed}, medians of {rounds}x{DOCUMENTS}; ratio over raw chunks",
                    peer={
                        "cold": median(row["cold"]),
                        "stored_MB": row["bytes"] / 1e6,
                        "same_text": sum(row["same"]) / len(row["same"]),
                    },
                )
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--speeds", default="100mbit,1gbit,unlimited")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", default="")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.model)
        return
    found = measure(args.model, args.speeds.split(","), args.modes.split(","), args.rounds)
    save(figures_of(found, args.rounds), args.out)
    show(args.out)


if __name__ == "__main__":
    main()
