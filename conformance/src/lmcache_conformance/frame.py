"""What a check is, what it may answer, and how one is run.

A check is a function of a `Rig`.  It returns when the rule holds and raises `Wrong` when it does
not; `NotClaimed` and `Inconclusive` are answers too.  Anything else that escapes is a FAIL.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

CLEANUP_LIMIT_S = 15.0


class Outcome(str, enum.Enum):
    """The five answers to a check."""

    PASS = "PASS"
    FAIL = "FAIL"
    WAIVED = "WAIVED"
    """Failed, and `kv-waivers.toml` names it."""
    NOT_CLAIMED = "NOT_CLAIMED"
    """The capability is not declared, and the backend declines it honestly."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """Claimed, but this machine or this harness can't prove it.  Blocks the profile."""


class Profile(str, enum.Enum):
    """What a group of checks certifies.  Each stands on ``core``."""

    CORE = "core"
    RESILIENT = "resilient"
    DURABLE = "durable"
    DIRECT = "direct"
    REPORT = "report"
    """Measured and shown; decides nothing."""


class Wrong(AssertionError):
    """The backend breaks the rule of the check."""


class NotClaimed(Exception):
    """The backend does not declare what the check is about."""


class Inconclusive(Exception):
    """It is declared, but can't be proven here; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule and its test.

    Attributes:
        id: family letter and number, such as ``"B3"``; never used again for another rule.
        name: of the function.
        rule: what must hold, in one line.
        fix: what an author whose backend fails should look at.
        profile: what it counts for.
        full_only: left out of the quick plan.
        limit_s: past it the check FAILs, since a call of the backend did not return.
        run: the test.
    """

    id: str
    name: str
    rule: str
    fix: str
    profile: Profile
    full_only: bool
    limit_s: float
    run: Callable[[Any], None]


class Subject(Protocol):
    """What a check is run on: a `Rig`, or what a codec is judged with."""

    seed: int
    figures: dict[str, float]

    def finish(self) -> list[str]:
        """Clean up; what could not be."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one check; ``reason`` is "" for a PASS."""

    id: str
    outcome: Outcome
    seconds: float
    seed: int
    reason: str = ""
    figures: dict[str, float] | None = None


def check(
    id: str,
    *,
    fix: str,
    profile: Profile = Profile.CORE,
    full_only: bool = False,
    limit_s: float = 120.0,
) -> Callable[[Callable[[Any], None]], Check]:
    """Make a `Check` of a function; its docstring is the rule."""

    def made(run: Callable[[Any], None]) -> Check:
        rule = " ".join((run.__doc__ or "").split())
        if not rule:
            raise TypeError(f"check {id} states no rule: write a docstring")
        return Check(
            id=id, name=run.__name__, rule=rule, fix=fix, profile=profile, full_only=full_only,
            limit_s=limit_s, run=run,
        )  # fmt: skip

    return made


def plan(checks: Iterable[Check], *, full: bool) -> list[Check]:
    """The checks of a run, in order."""
    return [each for each in checks if full or not each.full_only]


def run_check(check: Check, rig: Subject) -> Result:
    """Run one check on a rig of its own, and clean up after it; never raises.

    A backend that hangs is a FAIL: the check's thread is left behind.
    """
    started_s = time.monotonic()
    raised: list[BaseException | None] = []

    def work() -> None:
        try:
            check.run(rig)
        except BaseException as error:  # pytest.skip is a BaseException, and no answer
            raised.append(error)
        else:
            raised.append(None)

    _within(work, check.limit_s)
    outcome, reason = _judge(raised, check)
    cleanup: list[str] = []
    if not _within(lambda: cleanup.extend(rig.finish()), CLEANUP_LIMIT_S):
        cleanup.append(f"close() did not return within {CLEANUP_LIMIT_S:.0f} s")
    if cleanup and outcome is not Outcome.FAIL:
        outcome, reason = Outcome.FAIL, "; ".join(cleanup)
    return Result(
        id=check.id,
        outcome=outcome,
        seconds=round(time.monotonic() - started_s, 3),
        seed=rig.seed,
        reason=reason,
        figures=rig.figures or None,
    )


def _judge(raised: list[BaseException | None], check: Check) -> tuple[Outcome, str]:
    if not raised:
        return Outcome.FAIL, f"a call did not return within {check.limit_s:.0f} s"
    error = raised[0]
    if error is None:
        return Outcome.PASS, ""
    if isinstance(error, NotClaimed):
        return Outcome.NOT_CLAIMED, str(error)
    if isinstance(error, Inconclusive):
        return Outcome.INCONCLUSIVE, str(error)
    if isinstance(error, Wrong):
        return Outcome.FAIL, str(error)
    return Outcome.FAIL, f"{type(error).__name__}: {error}{_where(error)}"


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" (at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"


def _within(work: Callable[[], None], limit_s: float) -> bool:
    thread = threading.Thread(target=work, name="conformance-check", daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()
