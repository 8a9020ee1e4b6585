"""The default of an option has another type than the option."""

from dataclasses import replace

from lmcache_core.sdk import OptionSpec, hookimpl
from mutants.plugins.good import *  # noqa: F403
from mutants.plugins.good import INFO

KILLS = "A2"


@hookimpl
def lmcache_backend_info():
    return replace(INFO, options=(OptionSpec(name="size", type=int, default=0.0, help="bytes"),))
