"""Hooks of ``infinistore://``.  The native client is never imported here: see helper.py."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from lmcache_core.sdk import (
    API_VERSION,
    BackendInfo,
    ConfigError,
    HostServices,
    OptionSpec,
    Probe,
    RemoteConnector,
    check_ranges,
    hookimpl,
)

DEFAULT_PORT = 22345
INSTALL = "pip install 'lmcache-backend-infinistore[client]'"
_MIB = 1 << 20
_PROBE_LIMIT_S = 1.0
_LIBRARY, _LIBRARY_CACHE = b"libibverbs.so.1", "/etc/ld.so.cache"
_DEVICES = "/sys/class/infiniband"

OPTIONS = (
    OptionSpec(
        name="connection", type=str, default="tcp", choices=("tcp", "rdma"),
        help="how values travel",
    ),
    OptionSpec(
        name="rdma_device", type=str, default="mlx5_0", help="device of this host, for rdma"
    ),
    OptionSpec(
        name="link_type", type=str, default="Ethernet", choices=("Ethernet", "IB"),
        help="of that device, for rdma",
    ),
    OptionSpec(name="ib_port", type=int, default=1, help="port of that device, for rdma"),
    OptionSpec(
        name="helpers", type=int, default=2,
        help="helper processes that run the client, and calls at the same time",
    ),
    OptionSpec(
        name="bounce_bytes", type=int, default=256 * _MIB, unit="bytes",
        help="largest value; memory of a helper for values outside of core's arena, used as needed",
    ),
    OptionSpec(
        name="start_limit_s", type=float, default=5.0, unit="s",
        help="for a helper to start and connect",
    ),
    OptionSpec(
        name="restart_max_s", type=float, default=1.0, unit="s",
        help="longest delay between starts while they fail",
    ),
    OptionSpec(
        name="longest_deadline_s", type=float, default=10.0, unit="s",
        help="longest deadline of any client; replaced values are deleted so long after",
    ),
)  # fmt: skip


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="infinistore",
        version=metadata.version("lmcache-backend-infinistore"),
        schemes=("infinistore",),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help=f"infinistore://host[:port], port {DEFAULT_PORT} when absent",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether client and device are there, and a server listens where the URL names one."""
    try:
        _check(options)
        _check_machine(options["connection"])
        if not urlsplit(url).netloc:
            return Probe(usable=True, reason="the client is installed; no server asked")
        host, port = _address(url)
        socket.create_connection((host, port), timeout=_PROBE_LIMIT_S).close()
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    except OSError as error:
        return Probe(usable=False, reason=str(error), hint="is the server running?")
    return Probe(usable=True, reason="a server listens")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Start the first helper and let it connect."""
    _check(options)
    _check_machine(options["connection"])
    name, port = _address(url)
    from lmcache_backend_infinistore.connector import InfinistoreConnector
    from lmcache_backend_infinistore.supervisor import Settings

    settings = Settings(
        host=name,
        port=port,
        connection=options["connection"],
        rdma_device=options["rdma_device"],
        link_type=options["link_type"],
        ib_port=options["ib_port"],
        bounce_bytes=options["bounce_bytes"],
    )
    return InfinistoreConnector(
        settings,
        host,
        helpers=options["helpers"],
        start_limit_s=options["start_limit_s"],
        restart_max_s=options["restart_max_s"],
        longest_deadline_s=options["longest_deadline_s"],
    )


def _check(options: Mapping[str, Any]) -> None:
    limits = {
        "ib_port": (1, 255),
        "helpers": (1, 16),
        "bounce_bytes": (_MIB, 1 << 30),
        "start_limit_s": (0.5, 60),
        "restart_max_s": (0.1, 60),
        "longest_deadline_s": (0.1, 3600),
    }
    check_ranges(options, limits, backend="infinistore")


def _check_machine(connection: str) -> None:
    """
    Raises:
        ConfigError: something is not installed; the hint is the command that does it.
    """
    if importlib.util.find_spec("infinistore") is None:
        if not (3, 10) <= sys.version_info[:2] <= (3, 12):
            raise _wrong(
                f"infinistore has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]}",
                f"use Python 3.10, 3.11 or 3.12, then {INSTALL}",
            )
        raise _wrong("the client library infinistore is not installed", INSTALL)
    if not _has_verbs():
        raise _wrong("libibverbs.so.1 is not installed", "apt-get install libibverbs1")
    if connection == "rdma" and not (os.path.isdir(_DEVICES) and os.listdir(_DEVICES)):
        raise _wrong("this host has no RDMA device", "use connection=tcp, or load its driver")


def _has_verbs() -> bool:
    """Looked up, not loaded; the client needs it for TCP too."""
    try:
        with open(_LIBRARY_CACHE, "rb") as cache:
            return _LIBRARY in cache.read()
    except OSError:
        return True  # another loader; the helper will say


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    good = "write infinistore://host:port"
    try:
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(f"the URL has a wrong port: {error}", good) from error
    if not name or parts.path.strip("/") or parts.username is not None or port == 0:
        raise _wrong("the URL has more or less in it than a server's address", good)
    return name, port or DEFAULT_PORT


def _wrong(message: str, hint: str) -> ConfigError:
    return ConfigError(message, backend="infinistore", op="open", hint=hint)
