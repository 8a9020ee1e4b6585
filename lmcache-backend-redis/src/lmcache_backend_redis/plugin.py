"""Hooks of every ``redis`` scheme.  redis-py is imported at open only."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from lmcache_core.sdk import (
    API_VERSION,
    BackendInfo,
    BackendUnavailable,
    ConfigError,
    HostServices,
    OptionSpec,
    Probe,
    RemoteConnector,
    check_ranges,
    hookimpl,
)

_MIB = 1 << 20

OPTIONS = (
    OptionSpec(name="connections", type=int, default=4, help="connections at the same time"),
    OptionSpec(
        name="piece_bytes", type=int, default=2 * _MIB, unit="bytes",
        help="size of one Redis string at most, 1 to 4 MiB",
    ),
    OptionSpec(name="ttl_s", type=float, default=0.0, unit="s", help="time to live; 0 keeps"),
    OptionSpec(
        name="longest_deadline_s", type=float, default=10.0, unit="s",
        help="longest deadline of any client; unfinished and replaced pieces live twice as long",
    ),
    OptionSpec(name="db", type=int, default=0, help="database number, for unix://"),
    OptionSpec(name="username", type=str, default="", help="ACL user, for unix://"),
    OptionSpec(name="password", type=str, default="", secret=True, help="password, for unix://"),
    OptionSpec(name="ca_certs", type=str, default="", help="CA file, for rediss://"),
    OptionSpec(name="certfile", type=str, default="", help="client certificate, for rediss://"),
    OptionSpec(name="keyfile", type=str, default="", help="client key, for rediss://"),
    OptionSpec(
        name="cert_reqs", type=str, default="required", choices=("required", "none"),
        help="whether the server's certificate is verified, for rediss:// and with tls",
    ),
    OptionSpec(
        name="tls", type=bool, default=False, help="TLS, for redis+cluster and redis+sentinel://"
    ),
    OptionSpec(name="sentinel_username", type=str, default="", help="ACL user of the sentinels"),
    OptionSpec(
        name="sentinel_password", type=str, default="", secret=True, help="of the sentinels"
    ),
)  # fmt: skip
_DEFAULTS = {spec.name: spec.default for spec in OPTIONS}


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="redis",
        version=metadata.version("lmcache-backend-redis"),
        schemes=("redis", "rediss", "unix", "redis+cluster", "redis+sentinel"),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help="redis://[user:password@]host[:port][/db], rediss:// (TLS), unix:///path, "
        "redis+cluster://host:port[,host:port] or redis+sentinel://host:port[,host:port]/NAME",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether a server answers there; without host or path only whether redis-py is fit."""
    from lmcache_backend_redis.opening import CLUSTER, nodes_of, sessions_of

    parts = urlsplit(url)
    if not (parts.netloc or parts.path.strip("/")):
        return Probe(usable=True, reason=f"redis-py {metadata.version('redis')}; no server asked")
    deadline_s = time.monotonic() + 1.5
    try:
        if parts.scheme == CLUSTER:
            nodes = nodes_of(url, options, _DEFAULTS)
            nodes.refresh(deadline_s)
            nodes.close()
        else:
            sessions_of(url, options, _DEFAULTS, limit=1).connect(deadline_s).close()
    except (ConfigError, BackendUnavailable) as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    except TimeoutError:
        return Probe(usable=False, reason="no answer", hint="is the server running?")
    return Probe(usable=True, reason="a server answers")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Connect, and learn how the server evicts and persists."""
    from lmcache_backend_redis.opening import open_connector

    _check(options)
    return open_connector(url, options, _DEFAULTS, host)


def _check(options: Mapping[str, Any]) -> None:
    limits = {
        "connections": (1, 64),
        "piece_bytes": (_MIB, 4 * _MIB),
        "ttl_s": (0, 10 * 365 * 86400),
        "longest_deadline_s": (0.1, 3600),
    }
    check_ranges(options, limits, backend="redis")
