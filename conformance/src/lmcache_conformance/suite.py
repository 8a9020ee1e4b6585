"""`ConnectorConformance`: the checks as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lmcache_conformance.checks import CHECKS
from lmcache_conformance.frame import Check, Outcome
from lmcache_conformance.harness import Harness
from lmcache_conformance.judge import Judge


class ConnectorConformance:
    """Subclass it with ``harness``; every check is a test that can't be overridden.

    Attributes:
        harness: of the backend, made and not started.
    """

    harness: ClassVar[Harness]

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        ours = {name for name in vars(ConnectorConformance) if name.startswith("test_")}
        changed = sorted(ours & set(vars(cls)))
        if changed:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(changed)}: a check can't be changed; "
                "a known failure is named in kv-waivers.toml"
            )


def _test_of(check: Check) -> Callable[[Any, Judge, pytest.FixtureRequest], None]:
    def test(self: Any, kv_judge: Judge, request: pytest.FixtureRequest) -> None:
        if check not in kv_judge.plan:
            return
        result = kv_judge.run(check)
        request.node.user_properties.append(("kv_outcome", result.outcome.value))
        if result.outcome is Outcome.FAIL:
            pytest.fail(
                f"{check.id} {check.rule}\n  found: {result.reason}\n  fix:   {check.fix}\n"
                f"  seed:  {result.seed}",
                pytrace=False,
            )
        if result.reason:
            request.node.user_properties.append(("kv_reason", result.reason))

    test.__name__ = f"test_{check.id.lower()}_{check.name}"
    test.__doc__ = f"{check.id}: {check.rule}"
    return test


for _check in CHECKS:
    _made = _test_of(_check)
    setattr(ConnectorConformance, _made.__name__, _made)
