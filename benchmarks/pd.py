"""From the end of a prefill to the decoder's first step: our channels, and vLLM's NixlConnector.

    python benchmarks/pd.py --model build/models/SmolLM2-135M-Instruct [--rounds 4]

Every mode has a prefiller and a decoder of its own, alone on the machine, since engines that wait
spin; the modes take turns.  Each prompt has 2,000 tokens of its own, prefilled in steps of 512.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from figures import Figure, median, save, show, spread

from lmcache_core.channels.registry import Channels
from lmcache_core.demo.pd import ANSWER_TOKENS, PROMPT_TOKENS, step_gap_s
from lmcache_core.demo.pd_pair import Pair

VLLM = "vllm_nixl"
TURNS = 2
NOISE = 2.0
"""How many spreads ours may lie above vLLM's."""


def prompts(rounds: int, seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    return [{"ids": [rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]}
            for _ in range(rounds)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    logs = Path(tempfile.mkdtemp())
    channels = [scheme for scheme in ("tcp", "nixl+ucx") if scheme in Channels().schemes()]
    gaps: dict[str, list[float]] = {channel or VLLM: [] for channel in [*channels, ""]}
    prompt_sets = [prompts(args.rounds, seed) for seed in range(TURNS)]
    for turn, asked in enumerate(prompt_sets):
        names = list(gaps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            channel = "" if name == VLLM else name
            pair = Pair(logs / name.replace("+", "-"), args.model, channel=channel)
            try:
                pair.ask(asked[0] | {"first": 300}, 2)
                gaps[name] += [step_gap_s(*pair.ask(prompt, ANSWER_TOKENS)) for prompt in asked]
            finally:
                pair.close()
    figures = []
    theirs = median(gaps[VLLM])
    for channel in channels:
        ours = median(gaps[channel])
        allowed = theirs * (1 + NOISE * spread(gaps[VLLM]))
        figures.append(
            Figure(
                name=f"pd.gap_{channel.replace('+', '_')}",
                value=ours * 1000,
                unit="ms",
                limit=theirs * 1000,
                ratio=ours / theirs,
                target=allowed / theirs,
                met=ours <= allowed,
                spread=spread(gaps[channel]),
                method="prefiller's answer to decoder's first step; limit is vLLM's NixlConnector, target adds two of its spreads; 2,000 tokens",
            )
        )
    save(figures, args.out)
    show(args.out)


if __name__ == "__main__":
    main()
