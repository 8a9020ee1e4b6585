"""`CodecConformance`: the checks of codecs as tests of pytest."""

from __future__ import annotations

from typing import ClassVar

from lmcache_conformance.codecs.checks import CODEC_CHECKS
from lmcache_conformance.codecs.rig import CodecRig
from lmcache_conformance.fixed import FixedSuite, add_tests
from lmcache_conformance.frame import Check, Result, run_check
from lmcache_core.sdk import Codec


class CodecConformance(FixedSuite):
    """Subclass it with ``codec``; every check is a test that can't be overridden.

    Attributes:
        codec: made; it is prepared before the first check.
        seed: of everything random.
    """

    codec: ClassVar[Codec]
    seed: ClassVar[int] = 1


def _run(suite: CodecConformance, check: Check) -> Result:
    suite.codec.prepare()
    return run_check(check, CodecRig(suite.codec, seed=suite.seed))


add_tests(CodecConformance, CODEC_CHECKS, _run)
