"""`make demo PD=1`: a prompt is prefilled by one engine and decoded by another.

python -m lmcache_core.demo.pd --model build/models/SmolLM2-135M-Instruct [--build build]

A third engine without a connector says what the text must be; two more, with vLLM's own
NixlConnector, how long the same takes there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmcache_core.demo.models import document_text
from lmcache_core.demo.pd_pair import Engine, Pair

PROMPT_TOKENS = 2000
ANSWER_TOKENS = 24
MIN_HIDDEN = 0.5
WARM_UP = "A warm-up that shares nothing with the document, of more tokens than a block. " * 12


def prompt() -> dict[str, Any]:
    """Of exactly `PROMPT_TOKENS` tokens."""
    return {"text": document_text(), "first": PROMPT_TOKENS}


def step_gap_s(prefilled: dict[str, Any], decoded: dict[str, Any]) -> float:
    """From the end of the prefill to the decoder's first step."""
    return float(decoded["first_step_s"] - prefilled["first_token_s"])


def run_pair(console: Console, title: str, pair: Pair) -> tuple[dict[str, Any], dict[str, Any]]:
    """A warm-up and the prompt."""
    with console.status(title):
        try:
            pair.ask({"text": WARM_UP}, 2)
            told = pair.ask(prompt(), ANSWER_TOKENS)
        finally:
            pair.close()
    console.print(f"[green]done[/] {title}")
    return told


def reference(console: Console, logs: Path, model: str) -> dict[str, Any]:
    """What an engine without a connector answers."""
    with console.status("an engine alone"):
        engine = Engine(logs / "pd-alone.log", model)
        try:
            engine.ask("alone", **prompt(), tokens=ANSWER_TOKENS, params=None)
            told = engine.answer("alone")
        finally:
            engine.close()
    console.print("[green]done[/] an engine alone")
    return told


def judge(
    alone: dict[str, Any],
    ours: tuple[dict[str, Any], dict[str, Any]],
    nixl: tuple[dict[str, Any], dict[str, Any]] | None,
) -> dict[str, Any]:
    """The result, as it is written."""
    prefilled, decoded = ours
    transfer = (decoded["kv"] or {}).get("lmcache", {}).get("transfer", {})
    moved = int(transfer.get("received_bytes", 0))
    pushed = (prefilled["kv"] or {}).get("lmcache", {}).get("transfer", {})
    hidden = pushed.get("acknowledged_bytes", 0) / moved if moved else 0.0
    # The engine computes the last token again, to have its logits.
    recomputed = max(0, decoded["prefilled_tokens"] - 1)
    result: dict[str, Any] = {
        "prompt_tokens": decoded["prompt_tokens"],
        "text": decoded["text"],
        "text_equal": decoded["token_ids"] == alone["token_ids"],
        "decoder_prefilled_tokens": recomputed,
        "moved_bytes": moved,
        "acknowledged_before_prefill_end": round(hidden, 3),
        "prefill_end_to_first_decode_s": round(step_gap_s(*ours), 4),
        "same_nixl_s": round(step_gap_s(*nixl), 4) if nixl is not None else None,
        "reason": transfer.get("reason", "no transfer"),
    }
    result["ok"] = (
        result["text_equal"]
        and recomputed == 0
        and moved > 0
        and hidden >= MIN_HIDDEN
        and not result["reason"]
    )
    return result


def main() -> None:
    """Run the demo; exits with 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(prog="lmcache_core.demo.pd", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--channel", default="tcp", help="tcp or nixl+ucx")
    parser.add_argument("--no-nixl", action="store_true", help="leave out vLLM's NixlConnector")
    wish = parser.parse_args()
    console = Console(stderr=True)
    logs = wish.build / "demo-logs"
    alone = reference(console, logs, wish.model)
    title = f"a prefiller and a decoder over {wish.channel}"
    ours = run_pair(console, title, Pair(logs, wish.model, channel=wish.channel))
    nixl = None
    if not wish.no_nixl:
        pair = Pair(logs, wish.model, channel="")
        nixl = run_pair(console, "the same with vLLM's NixlConnector", pair)
    result = judge(alone, ours, nixl)
    table = Table(title="prefill on one engine, decode on another")
    table.add_column("what")
    table.add_column("value")
    for name, value in result.items():
        table.add_row(name, str(value))
    console.print(table)
    out = wish.build / "demo-pd.json"
    out.with_suffix(".part").write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".part").rename(out)
    if not result["ok"]:
        raise SystemExit("the demo failed: see the table above")


if __name__ == "__main__":
    main()
