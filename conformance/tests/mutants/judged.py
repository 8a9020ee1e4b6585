"""Judges one backend up to its first failure; `mutants.mechanical` starts it.

    python -m mutants.judged SECONDS HARNESS[:CHECK] ...

SECONDS is what each check takes on a right backend, as JSON; a check that is not in it is left out.
``{}`` is not known: then all are run.  Those that pass are measured and printed.  Exits with 1
after ``CHECK reason`` was printed for the first failure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading

from lmcache_conformance import frame
from lmcache_conformance.frame import Outcome, Profile
from lmcache_conformance.judge import find, judging

_PATIENCE_S = 8.0
"""How much longer than it should a check may take before the mutant counts as hanging."""


def main() -> None:
    """Judge; see above."""
    due: dict[str, float] = json.loads(sys.argv[1])
    taken: dict[str, float] = {}
    frame.CLEANUP_LIMIT_S = 6.0
    for word in sys.argv[2:]:
        name, _, only = word.partition(":")
        with judging(find(name), seed=1) as judge:
            for check in sorted(judge.plan, key=lambda each: due.get(each.id, 0.0)):
                if check.profile is Profile.REPORT or only not in ("", check.id):
                    continue
                if due and check.id not in due:
                    continue
                limit_s = _PATIENCE_S + 3 * due[check.id] if due else check.limit_s
                # What hangs outside of a check, such as the first open, ends here.
                watch = threading.Timer(limit_s + _PATIENCE_S, _hangs, (check.id,))
                watch.daemon = True
                watch.start()
                result = judge.run(dataclasses.replace(check, limit_s=limit_s))
                watch.cancel()
                if result.outcome is Outcome.PASS:
                    taken[check.id] = taken.get(check.id, 0.0) + result.seconds
                if result.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE):
                    print(check.id, result.reason, flush=True)
                    judge.close()
                    # Threads that a mutant left must not hold the process.
                    os._exit(1)
    print(json.dumps(taken), flush=True)
    sys.stdout.flush()
    os._exit(0)


def _hangs(check_id: str) -> None:
    print(check_id, "hangs", flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
