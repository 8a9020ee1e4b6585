"""`make demo`: cold, warm, and a new process with only a lower tier; judged by no cache.

python -m lmcache_core.demo --model build/models/SmolLM2-135M-Instruct [--build build]
    [--backend redis --url unix:///path/to/socket]

With ``--url`` the new process has an empty disk and is served from that store, which must
be empty at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CHUNK_TOKENS = 256
RUNS = ("cold", "warm", "restart")
QUESTIONS = {
    "cold": "\n\nQuestion: Who put the short shelf behind the front desk, and in which winter "
    "did she do it?\nAnswer:",
    "warm": "\n\nQuestion: What does a red card on the door of the lift tell the clerks of the "
    "library?\nAnswer:",
    "restart": "\n\nQuestion: Why do the porters write a new register after the cellar was "
    "closed?\nAnswer:",
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def run_child(
    console: Console, title: str, build: Path, order: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run one process of the demo; its log goes to a file, whose end is shown on failure."""
    name = order["out"]
    log = build / "demo-logs" / f"{name}.log"
    out = build / "demo-logs" / f"{name}.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lmcache_core.demo.child"]
    with log.open("w") as file, console.status(title):
        child = subprocess.Popen(
            [*command, json.dumps({**order, "out": str(out)})],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
        )
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait(10)
            console.print("interrupted; the engine was stopped")
            raise SystemExit(130) from None
    if code or not out.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{tail}\nerror: {title} failed\nhint: the whole log is {log}")
    console.print(f"[green]done[/] {title}")
    return list(json.loads(out.read_text()))


def check(run: dict[str, Any], reference: dict[str, Any], tier: str, chunked: int) -> list[str]:
    """What is not as it must be in one run; ``tier`` is where its chunks should come from."""
    name = run["name"]
    expected = {tier: chunked} if tier else {}
    prefilled = run["prompt_tokens"] - sum(expected.values())
    wrong = []
    if run["cached_tokens"] != expected:
        wrong.append(f"{name}: cached tokens are {run['cached_tokens']}, not {expected}")
    if run["prefilled_tokens"] != prefilled:
        wrong.append(f"{name}: {run['prefilled_tokens']} tokens were prefilled, not {prefilled}")
    if not 16 <= reference["question_tokens"] <= 64:
        wrong.append(f"{name}: the question has {reference['question_tokens']} tokens")
    if not run["text_equal"]:
        wrong.append(f"{name}: the text differs from the run without a cache")
    return wrong


def table(runs: list[dict[str, Any]], lower: str) -> Table:
    """What a person sees."""
    shown = Table(title="One document, three questions")
    for column in ("run", "TTFT", "over cold", "prompt", "prefilled", "host", lower, "text"):
        shown.add_column(column, justify="left" if column in ("run", "text") else "right")
    cold_s = runs[0]["ttft_s"]
    for run in runs:
        cached = run["cached_tokens"]
        shown.add_row(
            run["name"],
            f"{run['ttft_s']:.3f} s",
            f"{run['ttft_s'] / cold_s:.3f}",
            str(run["prompt_tokens"]),
            str(run["prefilled_tokens"]),
            str(cached.get("host", 0)),
            str(cached.get(lower, 0)),
            "equal" if run["text_equal"] else "DIFFERS",
        )
    return shown


def main() -> int:
    """Run the demo; 0 only when every claim held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--backend", default="file")
    parser.add_argument("--url", help="of an empty store that serves the new process")
    args = parser.parse_args()
    console = Console()
    lower = args.backend if args.url else "disk"
    stores = [(args.build / f"demo-store{suffix}").resolve() for suffix in ("", "-2")]
    for store in stores:
        shutil.rmtree(store, ignore_errors=True)
        assert not store.exists(), "the cold run must start with an empty directory"

    def tiers(store: Path) -> list[dict[str, str]]:
        disk = [{"host": "1GiB"}, {"url": f"file://{store}", "size": "8GiB"}]
        return [*disk, {"url": args.url, "name": lower}] if args.url else disk

    base = {"model": str(args.model)}
    asked = [QUESTIONS[name] for name in RUNS]
    judge = run_child(
        console,
        "1/3 without a cache: all three questions",
        args.build,
        {**base, "tiers": [], "questions": asked, "out": "reference"},
    )
    first = run_child(
        console,
        "2/3 cold, then warm in the same process",
        args.build,
        {**base, "tiers": tiers(stores[0]), "questions": asked[:2], "out": "first"},
    )
    second = run_child(
        console,
        f"3/3 a new process: host {'and disk ' if args.url else ''}empty, only {lower}",
        args.build,
        {
            **base,
            "tiers": tiers(stores[1] if args.url else stores[0]),
            "questions": asked[2:],
            "out": "second",
        },
    )
    tier_of = {"cold": "", "warm": "host", "restart": lower}
    runs: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name, got, reference in zip(RUNS, [*first, *second], judge):
        equal = got["token_ids"] == reference["token_ids"] and got["text"] == reference["text"]
        keys = ("ttft_s", "prompt_tokens", "prefilled_tokens", "cached_tokens")
        runs.append({"name": name, **{key: got[key] for key in keys}, "text_equal": equal})
        chunked = CHUNK_TOKENS * (got["shared_tokens"] // CHUNK_TOKENS)
        wrong += check(runs[-1], reference, tier_of[name], chunked)
    result = {"ok": not wrong, "model": args.model.name, "backend": args.backend, "runs": runs}
    suffix = f"-{args.backend}" if args.url else ""
    (args.build / f"demo{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(runs, lower))
    for line in wrong:
        console.print(f"[red]failed[/] {line}")
    if not wrong:
        saved = sum(runs[1]["cached_tokens"].values())
        console.print(f"Prefilled once: {saved} tokens came back, from host and from {lower}.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
