"""Its probe leaves a mark in the environment."""

import os

from lmcache_core.sdk import Probe, hookimpl
from mutants.plugins.good import *  # noqa: F403

KILLS = "A4"


@hookimpl
def lmcache_probe(url, options):
    os.environ["MUTANT_PROBED"] = str(os.getpid())
    return Probe(usable=True, reason="memory")
