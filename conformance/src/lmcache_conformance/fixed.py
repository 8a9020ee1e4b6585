"""Suites of pytest whose tests are checks, and whose checks a subclass can't change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest

from lmcache_conformance.frame import Check, Outcome, Result


class FixedSuite:
    """Base of every suite.

    Attributes:
        advice: what an author should do instead of overriding a check.
    """

    advice: ClassVar[str] = ""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        fixed = {name for base in cls.__mro__[1:] for name in vars(base) if _is_test(name)}
        changed = sorted(fixed & set(vars(cls)))
        if changed:
            why = f"a check can't be changed{cls.advice}"
            raise TypeError(f"{cls.__name__} overrides {', '.join(changed)}: {why}")


def add_test(suite: type[FixedSuite], check: Check, test: Callable[..., None]) -> None:
    """Make ``test`` the one of ``check`` in ``suite``."""
    test.__name__ = f"test_{check.id.lower()}_{check.name}"
    test.__doc__ = f"{check.id}: {check.rule}"
    setattr(suite, test.__name__, test)


def add_tests(
    suite: type[FixedSuite], checks: Iterable[Check], run: Callable[[Any, Check], Result]
) -> None:
    """A test for each of ``checks``: what ``run`` gives for the suite's instance and the check."""

    def test_of(check: Check) -> Callable[[Any], None]:
        return lambda self: fail_when_failed(check, run(self, check))

    for check in checks:
        add_test(suite, check, test_of(check))


def fail_when_failed(check: Check, result: Result, more: str = "") -> None:
    """Fail the running test when the check did, with its rule, what was found and the fix."""
    if result.outcome is Outcome.FAIL:
        pytest.fail(
            f"{check.id} {check.rule}\n  found: {result.reason}\n  fix:   {check.fix}{more}",
            pytrace=False,
        )


def _is_test(name: str) -> bool:
    return name.startswith("test_")
