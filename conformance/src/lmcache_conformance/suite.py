"""`ConnectorConformance`: the checks as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lmcache_conformance.checks import CHECKS
from lmcache_conformance.fixed import FixedSuite, add_test, fail_when_failed
from lmcache_conformance.frame import Check
from lmcache_conformance.harness import Harness
from lmcache_conformance.judge import Judge


class ConnectorConformance(FixedSuite):
    """Subclass it with ``harness``; every check is a test that can't be overridden.

    Attributes:
        harness: of the backend, made and not started.
    """

    harness: ClassVar[Harness]
    advice = "; a known failure is named in kv-waivers.toml"


def _test_of(check: Check) -> Callable[[Any, Judge, pytest.FixtureRequest], None]:
    def test(self: Any, kv_judge: Judge, request: pytest.FixtureRequest) -> None:
        if check not in kv_judge.plan:
            return
        result = kv_judge.run(check)
        request.node.user_properties.append(("kv_outcome", result.outcome.value))
        fail_when_failed(check, result, f"\n  seed:  {result.seed}")
        if result.reason:
            request.node.user_properties.append(("kv_reason", result.reason))

    return test


for _check in CHECKS:
    add_test(ConnectorConformance, _check, _test_of(_check))
