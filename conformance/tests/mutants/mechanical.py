"""How many mechanical mutants of our own connectors the suite alone finds.

    python -m mutants.mechanical [--backend file] [--limit 80] [--jobs 2]

Each mutant is judged by the quick plan, up to its first FAIL, in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants.mutate import Mutation, mutations

TARGET = 0.85
LIMIT_S = 120.0
OVERLAY = Path(__file__).with_name("overlay")
HOOKS = frozenset({"lmcache_backend_info", "lmcache_probe", "_capabilities", "capabilities"})
MODULES = {
    "memory": ["lmcache_core.connectors.memory"],
    "file": ["lmcache_core.connectors.file", "lmcache_core.sdk.value_files"],
    "redis": [
        f"lmcache_backend_redis.{name}"
        for name in ("connector", "layout", "reading", "scanning", "sessions", "wire", "writing")
    ],
}
HARNESSES = {"memory": ["memory"], "file": ["file", "file-synced:I5"], "redis": ["redis"]}
EXPLAINED = Path(__file__).with_name("survivors.json")
_JUDGE = """
import dataclasses
import sys
from lmcache_conformance.frame import Outcome, Profile
from lmcache_conformance.judge import find, judging
import os
for word in sys.argv[1:]:
  name, _, only = word.partition(":")
  with judging(find(name), seed=1) as judge:
    for check in judge.plan:
        if check.profile is Profile.REPORT or only not in ("", check.id):
            continue
        result = judge.run(dataclasses.replace(check, limit_s=20.0))
        if result.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE):
            print(check.id, result.reason, flush=True)
            judge.close()
            os._exit(1)
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``by`` is the check that found the mutant, "" for a survivor."""

    backend: str
    module: str
    mutation: Mutation
    by: str
    seconds: float

    @property
    def name(self) -> str:
        """What a survivor is called in the list of explanations."""
        return f"{self.module.rpartition('.')[2]}: {self.mutation.text} [{self.mutation.what}]"


def chosen(backend: str, limit: int) -> list[tuple[str, Mutation]]:
    """``limit`` mutants of a backend, spread over its modules; the same every time."""
    found = []
    for module in MODULES[backend]:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).read_text()
        found += [(module, each) for each in mutations(source, HOOKS)]
    random.Random(20).shuffle(found)
    return sorted(found[:limit], key=lambda each: (each[0], each[1].line, each[1].what))


def judge(backend: str, module: str, mutation: Mutation, folder: Path) -> Verdict:
    """Run the suite over one mutant."""
    path = folder / f"m{time.monotonic_ns()}.py"
    path.write_text(mutation.source)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(OVERLAY), os.environ.get("PYTHONPATH", "")]),
        "LMC_MUTANT": f"{module}={path}",
        "TMPDIR": str(folder),
    }
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", _JUDGE, *HARNESSES[backend]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
        by = ""
        if process.returncode:
            by = (out.split() or [err.strip().splitlines()[-1][:80] if err.strip() else "died"])[0]
    except subprocess.TimeoutExpired:
        by = f"hangs for {LIMIT_S:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return Verdict(backend, module, mutation, by, time.monotonic() - started_s)


def main() -> int:
    """Judge them all; 1 when fewer than `TARGET` are killed, or a survivor is not explained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=sorted(MODULES), action="append")
    parser.add_argument("--limit", type=int, default=70, help="mutants of each backend")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args()
    explained: dict[str, str] = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="lmc-mutants-"))
    work = [
        (backend, module, mutation, folder)
        for backend in options.backend or sorted(MODULES)
        for module, mutation in chosen(backend, options.limit)
    ]
    verdicts = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for verdict in pool.map(lambda arguments: judge(*arguments), work):
            verdicts.append(verdict)
            if not verdict.by:
                why = explained.get(verdict.name, "NOT EXPLAINED")
                print(f"survives {verdict.backend} {verdict.name}: {why}", flush=True)
    for backend in sorted({each.backend for each in verdicts}):
        own = [each for each in verdicts if each.backend == backend]
        killed = sum(bool(each.by) for each in own)
        print(f"{backend}: {killed}/{len(own)} killed ({killed / len(own):.0%})")
    killed = sum(bool(each.by) for each in verdicts)
    rate = killed / len(verdicts)
    print(f"mechanical mutants: {killed}/{len(verdicts)} killed ({rate:.1%}, due {TARGET:.0%})")
    return int(rate < TARGET)


if __name__ == "__main__":
    sys.exit(main())
