"""A plugin without a mistake; the others here import it and replace one thing."""

from lmcache_core.connectors.memory import MemoryConnector
from lmcache_core.sdk import API_VERSION, BackendInfo, ConfigError, OptionSpec, Probe, hookimpl

INFO = BackendInfo(
    name="mutant",
    version="1",
    schemes=("mutant",),
    api_min=(0, 9),
    api_tested=API_VERSION,
    options=(OptionSpec(name="size", type=int, default=0, help="bytes"),),
)


@hookimpl
def lmcache_backend_info():
    return INFO


@hookimpl
def lmcache_probe(url, options):
    return Probe(usable=True, reason="memory")


@hookimpl
def lmcache_open_connector(url, options, host):
    if options["size"] < 0:
        raise ConfigError("size is negative", hint="0: unbounded")
    return MemoryConnector(options["size"])
