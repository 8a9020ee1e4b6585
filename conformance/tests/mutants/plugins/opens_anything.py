"""A URL that can't work is opened, and fails at the first call."""

from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.sdk import hookimpl
from mutants.plugins.good import *  # noqa: F403

KILLS = "A3"


@hookimpl
def lmcache_open_connector(url, options, host):
    return MemoryConnector(max(0, options["size"]))
