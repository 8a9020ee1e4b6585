"""`CodecConformance`: the checks of codecs as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lmcache_conformance.codecs.checks import CODEC_CHECKS
from lmcache_conformance.codecs.rig import CodecRig
from lmcache_conformance.frame import Check, Outcome, run_check
from lmcache_core.sdk import Codec


class CodecConformance:
    """Subclass it with ``codec``; every check is a test that can't be overridden.

    Attributes:
        codec: made; it is prepared before the first check.
        seed: of everything random.
    """

    codec: ClassVar[Codec]
    seed: ClassVar[int] = 1

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        ours = {name for name in vars(CodecConformance) if name.startswith("test_")}
        changed = sorted(ours & set(vars(cls)))
        if changed:
            raise TypeError(f"{cls.__name__} overrides {', '.join(changed)}")


def _test_of(check: Check) -> Callable[[Any], None]:
    def test(self: Any) -> None:
        self.codec.prepare()
        result = run_check(check, CodecRig(self.codec, seed=self.seed))
        if result.outcome is Outcome.FAIL:
            pytest.fail(
                f"{check.id} {check.rule}\n  found: {result.reason}\n  fix:   {check.fix}",
                pytrace=False,
            )

    test.__name__ = f"test_{check.id.lower()}_{check.name}"
    test.__doc__ = f"{check.id}: {check.rule}"
    return test


for _check in CODEC_CHECKS:
    _made = _test_of(_check)
    setattr(CodecConformance, _made.__name__, _made)
