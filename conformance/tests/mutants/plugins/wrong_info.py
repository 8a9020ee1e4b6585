"""Its info does not name the scheme that it is found by."""

from dataclasses import replace

from lmcache_core.sdk import hookimpl
from mutants.plugins.good import *  # noqa: F403
from mutants.plugins.good import INFO

KILLS = "A2"


@hookimpl
def lmcache_backend_info():
    return replace(INFO, schemes=("other",))
