"""`ChannelConformance`: the checks of channels as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lmcache_conformance.channels.checks import CHANNEL_CHECKS
from lmcache_conformance.channels.rig import ChannelRig
from lmcache_conformance.channels.sides import Source
from lmcache_conformance.frame import Check, Outcome, run_check


class ChannelConformance:
    """Subclass it with ``source``; every check is a test that can't be overridden.

    Attributes:
        source: what is opened.
        quick: the short form of the long checks.
        seed: of everything random.
    """

    source: ClassVar[Source]
    quick: ClassVar[bool] = True
    seed: ClassVar[int] = 1

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        ours = {name for name in vars(ChannelConformance) if name.startswith("test_")}
        changed = sorted(ours & set(vars(cls)))
        if changed:
            raise TypeError(f"{cls.__name__} overrides {', '.join(changed)}")


def _test_of(check: Check) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        result = run_check(check, ChannelRig(self.source, seed=self.seed, quick=self.quick))
        if result.outcome is Outcome.FAIL:
            pytest.fail(
                f"{check.id} {check.rule}\n  found: {result.reason}\n  fix:   {check.fix}",
                pytrace=False,
            )

    test.__name__ = f"test_{check.id.lower()}_{check.name}"
    test.__doc__ = f"{check.id}: {check.rule}"
    return test


for _check in CHANNEL_CHECKS:
    _made = _test_of(_check)
    setattr(ChannelConformance, _made.__name__, _made)
