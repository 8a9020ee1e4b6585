"""One engine of the soak: answers random prompts and says of each whether it was right.

    python engine.py MODEL EXTRA_JSON PROMPTS_JSON SEED

EXTRA_JSON is the connector's configuration, or null: then the answers themselves are printed.
One JSON line a batch; ends when standard input does.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
from pathlib import Path
from typing import Any

BATCH = 4
MAX_TOKENS = 16


def rss_bytes() -> int:
    """Private memory of this process: without the arena."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def say(**values: Any) -> None:
    print("SOAK " + json.dumps(values), flush=True)


def told_to_end() -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready) and not os.read(0, 1)


def main() -> None:
    from conftest import Engine

    model, extra, file, seed = sys.argv[1:]
    given = json.loads(Path(file).read_text())
    settings = json.loads(extra)
    # Few pages, so that all are touched soon: else their first use looks like growth.
    pages = {"max_model_len": 2048, "block_size": 32, "num_gpu_blocks_override": 300}
    engine = Engine(Path(model), settings, **pages)
    if settings is None:
        answers = [engine.tokens([prompt], MAX_TOKENS)[0] for prompt in given["prompts"]]
        say(answers=answers)
        engine.close()
        return
    rng = random.Random(int(seed))
    say(ready=True)
    while not told_to_end():
        picked = [rng.randrange(len(given["prompts"])) for _ in range(BATCH)]
        outputs = engine.run([given["prompts"][i] for i in picked], MAX_TOKENS)
        right = [
            list(output.outputs[0].token_ids) == given["answers"][i]
            for output, i in zip(outputs, picked)
        ]
        say(
            requests=BATCH,
            wrong=right.count(False),
            cached_tokens=sum(output.num_cached_tokens for output in outputs),
            rss_bytes=rss_bytes(),
        )
    engine.settle()
    engine.close()
    say(closed=True)


if __name__ == "__main__":
    main()
