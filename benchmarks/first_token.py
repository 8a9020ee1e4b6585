"""Engines in processes of their own, and the time to their first token; for `ttft` and `link`."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_MARK = "RESULT "


def ask(engine: Any, name: str, ids: list[int], tokens: int = 8) -> dict[str, Any]:
    """One greedy request: seconds from add_request to its first token, tokens cached, and said."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start, first = time.perf_counter(), None
    engine.add_request(name, {"prompt_token_ids": ids}, params)
    last: Any = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if not outputs:
            time.sleep(0.001)
        for output in outputs:
            if first is None and output.outputs[0].token_ids:
                first = time.perf_counter() - start
            last = output
    return {
        "ttft": first,
        "cached": last.num_cached_tokens,
        "tokens": list(last.outputs[0].token_ids),
    }


def tell(result: Any, engine: Any) -> None:
    """Say ``result`` to the parent and end this process."""
    print(_MARK + json.dumps(result), flush=True)
    engine.engine_core.shutdown()
    os._exit(0)


def told(command: list[str], timeout_s: float, **env: str) -> Any:
    """What the child process ``command`` tells."""
    done = subprocess.run(
        command,
        env={**os.environ, **ENV, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise SystemExit(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
