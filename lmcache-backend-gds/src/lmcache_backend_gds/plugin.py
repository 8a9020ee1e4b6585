"""Hooks of ``gds://``.  kvikio is imported at open only, and only when it is to run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from lmcache_backend_gds import driver
from lmcache_core.sdk import (
    API_VERSION,
    BackendInfo,
    ConfigError,
    HostServices,
    OptionSpec,
    Probe,
    RemoteConnector,
    check_ranges,
    directory_of,
    hookimpl,
    writable,
)

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

OPTIONS = (
    OptionSpec(
        name="io", type=str, default="auto", choices=("auto", "posix", "kvikio"),
        help="what moves bytes; auto: kvikio where it, the driver and a device are, else posix",
    ),
    OptionSpec(
        name="durability", type=str, default="process", choices=("process", "host"),
        help="process: survives our death; host: synced, survives power loss",
    ),
    OptionSpec(
        name="direct", type=bool, default=False,
        help="O_DIRECT, around the page cache; claims an alignment of 4096",
    ),
    OptionSpec(
        name="queue_depth", type=int, default=4,
        help="values of one call that move at the same time, and threads that kvikio has at least",
    ),
    OptionSpec(
        name="task_size_bytes", type=int, default=4 * _MIB, unit="bytes",
        help="kvikio moves parts of this size of a value at the same time",
    ),
    OptionSpec(
        name="max_stuck", type=int, default=8,
        help="calls that hang past their deadline before the tier is unavailable",
    ),
)  # fmt: skip

_RANGES = {"queue_depth": (1, 64), "task_size_bytes": (64 * _KIB, _GIB), "max_stuck": (1, 64)}


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="gds",
        version=metadata.version("lmcache-backend-gds"),
        schemes=("gds",),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help="gds:///absolute/directory",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether the directory can be written, and what will move the bytes."""
    try:
        _check(options)
        path = directory_of(url, "gds")
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    if not writable(path):
        return Probe(usable=False, reason=f"{path} can't be written", hint="choose another one")
    if options["io"] == "posix":
        return Probe(usable=True, reason=f"{path} can be written; system calls, as io=posix says")
    found = driver.look()
    if not found.lacking:
        return Probe(usable=True, reason=f"{path} can be written; kvikio and the driver are here")
    if options["io"] == "kvikio":
        return Probe(usable=False, reason=f"io=kvikio: {found.lacking}", hint=found.hint)
    reason = f"{path} can be written; system calls, as {found.lacking}; {driver.ADDS}"
    return Probe(usable=True, reason=reason, hint=found.hint)


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Open, and make the directory when absent."""
    from lmcache_backend_gds.opening import open_connector

    _check(options)
    return open_connector(directory_of(url, "gds"), options, host)


def _check(options: Mapping[str, Any]) -> None:
    check_ranges(options, _RANGES, backend="gds")
