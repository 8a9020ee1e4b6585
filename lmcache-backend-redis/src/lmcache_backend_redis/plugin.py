"""Hooks of ``redis://``, ``rediss://`` and ``unix://``.  redis-py is imported at open only."""

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
    Sharing,
    hookimpl,
)

OPEN_LIMIT_S = 5.0
_MIB = 1 << 20
_TLS = ("ca_certs", "certfile", "keyfile", "cert_reqs")

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
        help="whether the server's certificate is verified, for rediss://",
    ),
)  # fmt: skip


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="redis",
        version=metadata.version("lmcache-backend-redis"),
        schemes=("redis", "rediss", "unix"),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help="redis://[user:password@]host[:port][/db] or unix:///path/to/socket",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether a server answers there; without host or path only whether redis-py is fit."""
    from lmcache_backend_redis.sessions import Sessions

    parts = urlsplit(url)
    if not (parts.netloc or parts.path.strip("/")):
        return Probe(usable=True, reason=f"redis-py {metadata.version('redis')}; no server asked")

    try:
        sessions = Sessions(url, _arguments(url, options), limit=1)
        sessions.connect(time.monotonic() + 1.5).close()
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
    from lmcache_backend_redis.connector import RedisConnector, server_facts
    from lmcache_backend_redis.sessions import Sessions

    _check(options)
    sessions = Sessions(url, _arguments(url, options), limit=options["connections"])
    try:
        facts = server_facts(sessions, time.monotonic() + OPEN_LIMIT_S)
    except TimeoutError as error:
        raise BackendUnavailable(
            f"the server did not answer within {OPEN_LIMIT_S:.0f} s",
            backend="redis",
            op="open",
            hint="is the server running, and does it listen there?",
        ) from error
    return RedisConnector(
        sessions,
        facts,
        connections=options["connections"],
        piece_bytes=options["piece_bytes"],
        ttl_s=options["ttl_s"],
        longest_deadline_s=options["longest_deadline_s"],
        sharing=Sharing.HOST if url.startswith("unix:") else Sharing.CLUSTER,
    )


def _check(options: Mapping[str, Any]) -> None:
    limits = {
        "connections": (1, 64),
        "piece_bytes": (_MIB, 4 * _MIB),
        "ttl_s": (0, 10 * 365 * 86400),
        "longest_deadline_s": (0.1, 3600),
    }
    for name, (low, high) in limits.items():
        if not low <= options[name] <= high:
            raise ConfigError(
                f"{name}={options[name]} is out of range",
                backend="redis",
                op="open",
                hint=f"give {low} to {high}",
            )


def _arguments(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """redis-py's arguments beside the URL."""
    scheme = urlsplit(url).scheme
    given = {
        "unix": {name: options[name] for name in ("db", "username", "password")},
        "rediss": {f"ssl_{name}": options[name] for name in _TLS},
    }
    for name in ("db", "username", "password", *_TLS):
        spec = next(spec for spec in OPTIONS if spec.name == name)
        belongs = "rediss" if name in _TLS else "unix"
        if options[name] != spec.default and scheme != belongs:
            raise ConfigError(
                f"option {name} is for {belongs}:// URLs",
                backend="redis",
                op="open",
                hint="write rediss:// for TLS; user, password and db go into a redis:// URL",
            )
    return {name: value for name, value in given.get(scheme, {}).items() if value != ""}
