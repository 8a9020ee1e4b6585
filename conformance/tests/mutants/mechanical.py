"""How many mechanical mutants of our own connectors the suite alone finds.

    python -m mutants.mechanical [--backend file] [--limit 80] [--jobs 3]

Every mutant of ``memory`` and ``file`` is judged, and of ``redis`` a sample that is the same every
time: so many of each module as its share is.  A mutant is judged by the quick plan in a process of
its own, up to the first check that FAILs or is INCONCLUSIVE: that one would have no certificate.
The connector as it is, which must pass, runs first; it tells what each check takes, so that the
quick ones run first and a mutant that hangs is known soon.  What it does not claim is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lmcache_conformance.harness import unmount
from mutants.mutate import Mutation, mutations

TARGET = 0.85
LIMIT_S = 150.0
OVERLAY = Path(__file__).with_name("overlay")
MODULES = {
    "memory": ["lmcache_core.connectors.memory"],
    "file": ["lmcache_core.connectors.file", "lmcache_core.sdk.value_files"],
    "redis": [
        f"lmcache_backend_redis.{name}"
        for name in ("connector", "layout", "reading", "scanning", "sessions", "wire", "writing")
    ],
}
SKIPPED = frozenset(
    {
        # What a backend says of itself: claims are compared with nothing but themselves.
        "lmcache_backend_info", "lmcache_probe", "_capabilities", "capabilities",
        # Used by rediss:// and redis+cluster:// only, which are not judged here.
        "TlsWire", "ok", "failed",
    }
)  # fmt: skip
SAMPLED = ("redis",)
HARNESSES = {"memory": ["memory"], "file": ["file-synced:I5", "file"], "redis": ["redis"]}
EXPLAINED = Path(__file__).with_name("survivors.json")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``by`` is the check that found the mutant, "" for a survivor; ``said`` is its reason."""

    backend: str
    name: str
    by: str
    said: str
    seconds: float


def chosen(backend: str, limit: int) -> list[tuple[str, Mutation]]:
    """The mutants of a backend to judge: all, or ``limit`` spread over its modules."""
    found = {}
    for module in MODULES[backend]:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        found[module] = list(mutations(Path(spec.origin).read_text(), SKIPPED))
    total = sum(map(len, found.values()))
    if backend in SAMPLED and limit < total:
        dice = random.Random(20)
        found = {
            module: dice.sample(every, round(limit * len(every) / total))
            for module, every in found.items()
        }
    return [
        (module, each)
        for module, every in found.items()
        for each in sorted(every, key=lambda each: (each.line, each.what))
    ]


def name_of(module: str, mutation: Mutation) -> str:
    """What a survivor is called in the list of explanations."""
    return f"{module.rpartition('.')[2]}: {mutation.text} [{mutation.what}]"


def baseline(backend: str, folder: Path) -> dict[str, float]:
    """Seconds that each check takes on the connector as it is.

    Raises:
        RuntimeError: it does not pass here, or not with the quick checks first, so a mutant's
            failure would say nothing.
    """
    seconds: dict[str, float] = {}
    for _ in range(2):
        done = _judged(backend, {}, folder, json.dumps(seconds))
        if done.returncode:
            raise RuntimeError(f"{backend} as it is: {done.stdout}{done.stderr[-2000:]}")
        seconds = json.loads(done.stdout.splitlines()[-1])
    return seconds


def judge(
    backend: str, module: str, mutation: Mutation, folder: Path, seconds: dict[str, float]
) -> Verdict:
    """Run the suite over one mutant."""
    path = folder / f"m{time.monotonic_ns()}.py"
    path.write_text(mutation.source)
    started_s = time.monotonic()
    done = _judged(backend, {"LMC_MUTANT": f"{module}={path}"}, folder, json.dumps(seconds))
    by, _, said = done.stdout.strip().partition(" ")
    if not done.returncode:
        by = ""
    elif not by:
        errors = done.stderr.strip().splitlines()
        by, said = "no start", errors[-1] if errors else f"ended with {done.returncode}"
    taken_s = time.monotonic() - started_s
    return Verdict(backend, name_of(module, mutation), by, said, taken_s)


def _judged(
    backend: str, environment: dict[str, str], folder: Path, seconds: str
) -> subprocess.CompletedProcess[str]:
    """`mutants.judged` in a process group of its own, which ends with it."""
    command = [sys.executable, "-m", "mutants.judged", seconds, *HARNESSES[backend]]
    paths = [str(OVERLAY), str(OVERLAY.parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            **environment,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(folder),
        },
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        out, err = f"all hangs for {LIMIT_S:.0f} s", ""
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _rate(what: str, verdicts: list[Verdict]) -> str:
    killed = sum(bool(each.by) for each in verdicts)
    return f"{what}: {killed}/{len(verdicts)} killed ({killed / len(verdicts):.1%})"


def main() -> int:
    """Judge them all; 1 when fewer than `TARGET` are killed, or a survivor is not explained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=sorted(MODULES), action="append")
    parser.add_argument("--limit", type=int, default=80, help="mutants of a backend with a sample")
    # One more than there are cores: much of a check is waiting.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 2) + 1)
    parser.add_argument("--report", type=Path, help="write every verdict there, as JSON lines")
    options = parser.parse_args()
    explained: dict[str, str] = json.loads(EXPLAINED.read_text())
    folder = Path(tempfile.mkdtemp(prefix="lmc-mutants-"))
    backends = options.backend or list(MODULES)
    started_s = time.monotonic()
    verdicts: list[Verdict] = []
    unexplained = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        due = dict(zip(backends, pool.map(lambda each: baseline(each, folder), backends)))
        work = [
            (backend, *each, folder, due[backend])
            for backend in backends
            for each in chosen(backend, options.limit)
        ]
        for verdict in pool.map(lambda arguments: judge(*arguments), work):
            verdicts.append(verdict)
            if not verdict.by:
                why = explained.get(verdict.name, "NOT EXPLAINED")
                unexplained += verdict.name not in explained
                print(f"survives {verdict.backend} {verdict.name}: {why}", flush=True)
            if options.report:
                with options.report.open("a") as file:
                    file.write(json.dumps([*_fields(verdict)]) + "\n")
    for disk in folder.glob("*/store/small"):
        unmount(disk)  # of a mutant that hung
    shutil.rmtree(folder, ignore_errors=True)
    for backend in backends:
        print(_rate(backend, [each for each in verdicts if each.backend == backend]))
    stale = sorted(set(explained) - {each.name for each in verdicts if not each.by})
    if stale and set(backends) == set(MODULES):
        print("explained, but no survivor of this sample:", *stale, sep="\n  ")
    print(f"{_rate('mechanical mutants', verdicts)}, due {TARGET:.0%}; {unexplained} survivors are "
          f"not explained; {time.monotonic() - started_s:.0f} s")  # fmt: skip
    killed = sum(bool(each.by) for each in verdicts)
    return int(killed < TARGET * len(verdicts) or unexplained > 0)


def _fields(verdict: Verdict) -> tuple[object, ...]:
    return verdict.backend, verdict.name, verdict.by, verdict.said[:300], round(verdict.seconds, 1)


if __name__ == "__main__":
    sys.exit(main())
