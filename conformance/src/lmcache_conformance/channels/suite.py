"""`ChannelConformance`: the checks of channels as tests of pytest."""

from __future__ import annotations

from typing import ClassVar

from lmcache_conformance.channels.checks import CHANNEL_CHECKS
from lmcache_conformance.channels.rig import ChannelRig
from lmcache_conformance.channels.sides import Source
from lmcache_conformance.fixed import FixedSuite, add_tests
from lmcache_conformance.frame import Check, Result, run_check


class ChannelConformance(FixedSuite):
    """Subclass it with ``source``; every check is a test that can't be overridden.

    Attributes:
        source: what is opened.
        quick: the short form of the long checks.
        seed: of everything random.
    """

    source: ClassVar[Source]
    quick: ClassVar[bool] = True
    seed: ClassVar[int] = 1


def _run(suite: ChannelConformance, check: Check) -> Result:
    return run_check(check, ChannelRig(suite.source, seed=suite.seed, quick=suite.quick))


add_tests(ChannelConformance, CHANNEL_CHECKS, _run)
