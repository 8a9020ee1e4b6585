"""How core finds and opens the backend; imports nothing native."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from lmcache_core.sdk import (
    BackendInfo,
    ConfigError,
    HostServices,
    Probe,
    RemoteConnector,
    hookimpl,
)


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="shelf",
        version="0.1.0",
        schemes=("shelf",),
        api_min=(0, 9),
        api_tested=(0, 9),
        url_help="shelf:///absolute/directory",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether the library can be built."""
    from lmcache_backend_shelf.native import compiler

    found = compiler()
    if found is None:
        return Probe(usable=False, reason="no C compiler", hint="apt-get install gcc")
    return Probe(usable=True, reason=f"compiled with {found}")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Open the store; the folder is made when absent."""
    from lmcache_backend_shelf.connector import ShelfConnector

    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(f"{url!r} has no absolute path", hint="shelf:///absolute/directory")
    try:
        return ShelfConnector(parts.path, host)
    except OSError as error:
        raise ConfigError(f"{parts.path}: {error}", hint="a folder that can be written") from error
