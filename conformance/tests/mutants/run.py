"""Every wrong backend must be found by the check that is meant for it.

python -m mutants.run [--only NAME] [--jobs 2]
"""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmcache_backend_redis.conformance import DATABASE, RedisHarness
from lmcache_conformance import Harness
from lmcache_conformance.builtin import FileHarness, MemoryHarness
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.frame import Outcome, Profile
from lmcache_conformance.judge import judging
from mutants.plugin import catalogue

PLUGINS = Path(__file__).with_name("plugins")
NOT_MEANT = {"D5"}
"""Checks of the full plan only."""
LIMIT_S = 150.0


class MutantMemory(MemoryHarness):
    module = "mutants.plugin"

    def __init__(self, mutant: str) -> None:
        self.mutant = mutant

    def url(self) -> str:
        return f"mutant://?name={self.mutant}"

    def small_url(self, size_bytes: int) -> str:
        return f"{self.url()}&size={size_bytes}"

    def bad_urls(self) -> list[str]:
        return []


class MutantFile(FileHarness):
    module = "mutants.plugin"

    def __init__(self, mutant: str) -> None:
        self.mutant = mutant

    def url(self) -> str:
        return f"mutant://{self.scratch}/kv?name={self.mutant}"


class MutantRedis(RedisHarness):
    module = "mutants.plugin"

    def __init__(self, mutant: str) -> None:
        self.mutant = mutant
        self.arguments = getattr(catalogue()[mutant].make, "arguments", self.arguments)

    def url_at(self, host: str, port: int) -> str:
        return f"mutant://{host}:{port}/{DATABASE}?name={self.mutant}"


class MutantPlugin(MemoryHarness):
    def __init__(self, module: str) -> None:
        self.module = f"mutants.plugins.{module}"

    def url(self) -> str:
        return "mutant://"

    def bad_urls(self) -> list[str]:
        return ["mutant://?size=-1"]


def meant() -> dict[str, str]:
    """Name of every mutant -> the check that must find it."""
    found = {name: mutant.kills for name, mutant in catalogue().items()}
    for path in sorted(PLUGINS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KILLS":
                assert isinstance(node.value, ast.Constant)
                found[path.stem] = node.value.value
    return found


def harness_of(name: str) -> Harness:
    """What a mutant is judged with."""
    mutant = catalogue().get(name)
    if mutant is None:
        return MutantPlugin(name)
    made = {"memory": MutantMemory, "file": MutantFile, "redis": MutantRedis}[mutant.base]
    return made(name)


def judge_here(name: str, check_id: str) -> int:
    """Run one check on one mutant in this process; 1 when it is found."""
    check = next(each for each in CHECKS if each.id == check_id)
    with judging(harness_of(name), seed=1) as judge:
        result = judge.run(check)
        print(result.outcome.value, result.reason, flush=True)
        judge.close()
        # Threads that a mutant left must not hold the process.
        os._exit(int(result.outcome is Outcome.FAIL))


def judged(name: str, check_id: str) -> tuple[bool, str]:
    """Whether the mutant is found, in a process of its own; a crash or hang is no answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mutants.run", "--judge", name, check_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        said = f"no answer within {LIMIT_S:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return "FAIL " in said and process.returncode == 1, said.strip()


def main() -> int:
    """Judge all; 1 when one survives, or a check has no mutant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--judge", nargs=2, metavar=("NAME", "ID"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        return judge_here(*options.judge)
    wanted = {n: c for n, c in meant().items() if options.only in (None, n)}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(wanted, pool.map(lambda each: judged(*each), wanted.items())))
    for name, (killed, said) in found.items():
        if options.only or not killed:
            print(f"{'killed' if killed else 'SURVIVES'} {name} ({wanted[name]}): {said[-500:]}")
    measured = {each.id for each in CHECKS if each.profile is Profile.REPORT}
    idle = [c.id for c in CHECKS if c.id not in {*meant().values(), *measured, *NOT_MEANT}]
    if idle and not options.only:
        print(f"checks without a mutant: {', '.join(idle)}")
    count = sum(killed for killed, _ in found.values())
    print(f"{count}/{len(found)} killed")
    return int(count < len(found) or bool(idle and not options.only))


if __name__ == "__main__":
    sys.exit(main())
