"""One engine of the soak: answers random prompts and says of each whether it was right.

    python engine.py MODEL EXTRA_JSON PROMPTS_JSON SEED

EXTRA_JSON is the connector's configuration, or null: then the answers themselves are printed.
One JSON line a batch; ends when standard input does.  vLLM's own memory grows too (by 450 MiB in
the first minute of this traffic without a connector), so what our code allocates is told apart.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import lmcache_core

BATCH = 4
MAX_TOKENS = 16
LOOK_EVERY_S = 5.0


def rss_bytes() -> int:
    """Private memory of this process: without the arena."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def own_bytes() -> int:
    """Python memory that our code has allocated and not given back."""
    ours = tracemalloc.Filter(True, str(Path(lmcache_core.__file__).parent / "*"))
    snapshot = tracemalloc.take_snapshot().filter_traces([ours])
    return sum(trace.size for trace in snapshot.traces)


def arenas() -> int:
    """How often an arena is mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:lmcache-arena")


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
    engine = Engine(Path(model), settings, max_model_len=2048, block_size=32)
    if settings is None:
        answers = [engine.tokens([prompt], MAX_TOKENS)[0] for prompt in given["prompts"]]
        say(answers=answers)
        engine.close()
        return
    rng = random.Random(int(seed))
    say(ready=True)
    tracemalloc.start()
    looked_s = time.monotonic()
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
        )
        if time.monotonic() - looked_s > LOOK_EVERY_S:
            looked_s = time.monotonic()
            say(own_bytes=own_bytes(), rss_bytes=rss_bytes(), arenas=arenas())
    engine.settle()
    engine.close()
    say(closed=True)


if __name__ == "__main__":
    main()
