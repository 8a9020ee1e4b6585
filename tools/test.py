"""`make test`: system packages, a small environment for nox, every session, a summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from system import need

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "venv-nox"
# fmt: off
SESSIONS = (
    "lint", "types", "imports", "api", "unit", "wheels", "stores", "conformance", "third_party",
    "mutants", "vllm", "demo",
)
# fmt: on
OPTIONS = {"mutants": ("--", "--wrong-only")}


def system_packages() -> None:
    need("gcc", "make", "redis-server", libraries=("libnuma.so.1",))


def main() -> int:
    os.chdir(ROOT)
    system_packages()
    nox = VENV / "bin" / "nox"
    if not nox.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "pip"), "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "nox"], check=True)
    rows: list[tuple[str, str, float]] = []
    for session in sys.argv[1:] or SESSIONS:
        start = time.monotonic()
        print(f"\n=== {session}", flush=True)
        report = ROOT / "build" / "nox.json"
        report.unlink(missing_ok=True)
        command = [str(nox), "-r", "-s", session, "--report", str(report)]
        command += OPTIONS.get(session, ())
        code = subprocess.run(command).returncode
        found = json.loads(report.read_text())["sessions"] if report.exists() else []
        results = {row["result"] for row in found}
        state = "failed" if code else "did not run" if results <= {"skipped"} else "ok"
        rows.append((session, state, time.monotonic() - start))
    print("\n=== summary")
    for session, state, seconds in rows:
        print(f"{session:10} {state:12} {seconds:6.0f} s")
    print("Conformance ran the quick plan; nox -s conformance -- --full runs the long one.")
    print("Not run here: mechanical mutants, which take 10 minutes more; nox -s mutants runs them.")
    print("Not run here: RDMA, GPUDirect Storage, an S3 service that is not moto (no hardware).")
    print("Not run here: CUDA copies and cudaHostRegister on hardware (no accelerator).")
    return int(any(state != "ok" for _, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
