"""The plugin that opens a wrong backend by its name: ``mutant://?name=NAME&path=...``."""

from __future__ import annotations

import importlib

from lmcache_backend_redis.connector import server_facts
from lmcache_backend_redis.sessions import Sessions
from lmcache_core.sdk import API_VERSION, BackendInfo, OpContext, OptionSpec, Probe, hookimpl
from mutants.catalogue import Mutant, collect

MODULES = {"memory": "in_memory", "file": "on_disk", "redis": "over_tcp"}


def catalogue() -> dict[str, Mutant]:
    """Every wrong connector by its name."""
    found: dict[str, Mutant] = {}
    for base, module in MODULES.items():
        found.update(collect(importlib.import_module(f"mutants.{module}"), base))
    return found


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    return BackendInfo(
        name="mutant",
        version="1",
        schemes=("mutant",),
        api_min=API_VERSION,
        api_tested=API_VERSION,
        options=(
            OptionSpec(name="name", type=str, default="", help="the mutant's"),
            OptionSpec(name="size", type=int, default=0, help="bytes"),
        ),
    )


@hookimpl
def lmcache_probe(url, options):
    return Probe(usable=True, reason="a mutant")


@hookimpl
def lmcache_open_connector(url, options, host):
    mutant = catalogue()[options["name"]]
    rest = url.partition("://")[2]
    if mutant.base == "memory":
        return mutant.make(options["size"])
    if mutant.base == "file":
        return mutant.make(rest, released=host.released)
    sessions = Sessions(f"redis://{rest}", {}, limit=4)
    facts = server_facts(sessions, OpContext(deadline_s=host.clock() + 5).deadline_s)
    return mutant.make(sessions, facts, connections=4)
