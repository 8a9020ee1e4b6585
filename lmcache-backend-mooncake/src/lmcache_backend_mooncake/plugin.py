"""Hooks of ``mooncake://``.  The library is loaded by the helper process only."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from lmcache_backend_mooncake.library import missing
from lmcache_backend_mooncake.settings import OPTIONS, URL_HELP, master_of, read_settings
from lmcache_core.sdk import (
    API_VERSION,
    BackendInfo,
    BackendUnavailable,
    ConfigError,
    HostServices,
    Probe,
    RemoteConnector,
    hookimpl,
)

OPEN_LIMIT_S = 12.0
_REACH_LIMIT_S = 2.0


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="mooncake",
        version=metadata.version("lmcache-backend-mooncake"),
        schemes=("mooncake",),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help=URL_HELP,
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether the library is here and, where the URL names one, something listens there."""
    lacking = missing()
    if lacking is not None:
        return Probe(usable=False, reason=lacking[0], hint=lacking[1])
    if not urlsplit(url).netloc:
        return Probe(usable=True, reason="the library is installed; no master asked")
    try:
        read_settings(url, options)
        _reach(*master_of(url), limit_s=1.0)
    except (ConfigError, BackendUnavailable) as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    return Probe(usable=True, reason="the library is installed, and a master listens there")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Start the helper process and let it open the store."""
    from lmcache_backend_mooncake.connector import MooncakeConnector

    settings = read_settings(url, options)
    lacking = missing()
    if lacking is not None:
        raise ConfigError(lacking[0], backend="mooncake", op="open", hint=lacking[1])
    _reach(*settings.master, limit_s=_REACH_LIMIT_S)
    return MooncakeConnector(settings, host, host.clock() + OPEN_LIMIT_S)


def _reach(host: str, port: int, limit_s: float) -> None:
    """
    Raises:
        BackendUnavailable: nothing listens there.
    """
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except OSError as error:
        raise BackendUnavailable(
            f"no connection to {host}:{port}: {error.strerror or error}",
            backend="mooncake",
            op="open",
            hint="start mooncake_master there: it listens on its -rpc_port, 50051 by default",
        ) from error
