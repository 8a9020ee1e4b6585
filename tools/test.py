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
    "lint", "types", "imports", "api", "docs", "unit", "web", "wheels", "stores", "conformance",
    "codecs", "third_party", "mutants", "vllm", "codec_report", "gpu", "soak", "demo",
    "controller_e2e",
)
# fmt: on
OPTIONS = {"mutants": ("--", "--wrong-only"), "codec_report": ("--", "--windows", "8")}
LOGS = ROOT / "build" / "logs"
TAIL_LINES = 60


def system_packages() -> None:
    need("gcc", "make", "redis-server", libraries=("libnuma.so.1",))


def run(command: list[str], log: Path) -> int:
    """Run ``command`` with its output shown and kept in ``log``; its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    with log.open("wb") as file:
        for line in process.stdout:
            file.write(line)
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
    return process.wait()


def show_failure(session: str) -> None:
    """What a reader of a long output would look for first: the failed parts, and the end."""
    lines = (LOGS / f"{session}.log").read_text(errors="replace").splitlines()
    marks = ("FAILED ", "ERROR ", "FAIL ", "E   ", "nox > Session", "nox > *")
    found = [line for line in lines if line.startswith(marks) and "was successful" not in line]
    print(f"\n=== {session} failed: build/logs/{session}.log ends with")
    print("\n".join([*found[-TAIL_LINES:], "...", *lines[-TAIL_LINES // 3 :]]))


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
        code = run(command, LOGS / f"{session}.log")
        found = json.loads(report.read_text())["sessions"] if report.exists() else []
        results = {row["result"] for row in found}
        state = "failed" if code else "did not run" if results <= {"skipped"} else "ok"
        rows.append((session, state, time.monotonic() - start))
    for session, state, _ in rows:
        if state != "ok":
            show_failure(session)
    print("\n=== summary")
    for session, state, seconds in rows:
        print(f"{session:10} {state:12} {seconds:6.0f} s")
    print("Conformance ran the quick plan; nox -s conformance -- --full runs the long one.")
    print("The codec report read 8 windows of its text; nox -s codec_report reads 24.")
    print("Not run here: mechanical mutants, which take 10 minutes more; nox -s mutants runs them.")
    print("Not run here: RDMA, GPUDirect Storage, an S3 service that is not moto (no hardware).")
    print("Not run here: CUDA copies and cudaHostRegister on hardware (no accelerator).")
    print("The soak ran 2 minutes; nox -s soak -- --minutes 30 runs the long one.")
    return int(any(state != "ok" for _, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
