"""From a URL and its options to an open connector: one server, a cluster, or behind sentinels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from lmcache_backend_redis.cluster import ClusterConnector
from lmcache_backend_redis.connector import RedisConnector, server_facts
from lmcache_backend_redis.nodes import Address, Nodes
from lmcache_backend_redis.sentinel import SentinelSessions
from lmcache_backend_redis.sessions import Sessions
from lmcache_core.sdk import (
    BackendUnavailable,
    ConfigError,
    HostServices,
    RemoteConnector,
    Sharing,
)

OPEN_LIMIT_S = 5.0
_TLS = ("ca_certs", "certfile", "keyfile", "cert_reqs")
CLUSTER, SENTINEL = "redis+cluster", "redis+sentinel"
_FORM = {
    CLUSTER: "redis+cluster://[user:password@]host:port[,host:port]",
    SENTINEL: "redis+sentinel://[user:password@]sentinel:26379[,sentinel:26379]/NAME[/db]",
}
_BELONGS = {
    **{name: ("rediss", CLUSTER, SENTINEL) for name in _TLS},
    **{name: ("unix",) for name in ("db", "username", "password")},
    "tls": (CLUSTER, SENTINEL),
    "sentinel_username": (SENTINEL,),
    "sentinel_password": (SENTINEL,),
}


def open_connector(
    url: str, options: Mapping[str, Any], defaults: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Connect, and learn how the server evicts and persists.

    Raises:
        ConfigError: see `sessions_of`; the server refuses these credentials.
        BackendUnavailable: nobody answers.
    """
    deadline_s = time.monotonic() + OPEN_LIMIT_S
    common = {name: options[name] for name in ("piece_bytes", "ttl_s", "longest_deadline_s")}
    connections: int = options["connections"]
    if urlsplit(url).scheme == CLUSTER:
        nodes = nodes_of(url, options, defaults)
        try:
            nodes.refresh(deadline_s)
        except BaseException:
            nodes.close()
            raise
        return ClusterConnector(nodes, counter=host.counter, connections=connections, **common)
    sessions = sessions_of(url, options, defaults, limit=connections)
    try:
        facts = server_facts(sessions, deadline_s)
    except TimeoutError as error:
        raise BackendUnavailable(
            f"the server did not answer within {OPEN_LIMIT_S:.0f} s",
            backend="redis",
            op="open",
            hint="is the server running, and does it listen there?",
        ) from error
    if facts.get("cluster_enabled") == "1":
        raise ConfigError(
            "the server is a node of a cluster",
            backend="redis",
            op="open",
            hint=f"write {_FORM[CLUSTER]}",
        )
    made = RedisConnector(
        sessions,
        facts,
        connections=connections,
        sharing=Sharing.HOST if url.startswith("unix:") else Sharing.CLUSTER,
        **common,
    )
    if isinstance(sessions, SentinelSessions):
        # Replication is asynchronous: a failover may lose what was acknowledged last.
        made.capabilities = replace(made.capabilities, evicts=True)
    return made


def sessions_of(
    url: str, options: Mapping[str, Any], defaults: Mapping[str, Any], *, limit: int
) -> Sessions:
    """Connections to one server, or to the master that sentinels name; none is made yet.

    Raises:
        ConfigError: the URL can't be read, or an option does not belong to it.
    """
    arguments = _arguments(url, options, defaults)
    parts = urlsplit(url)
    if parts.scheme != SENTINEL:
        return Sessions(url, arguments, limit=limit)
    places, _ = _places(url)
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise _malformed(url, "it names no master")
    secrets = (options["sentinel_username"], options["sentinel_password"])
    sentinels = [
        Sessions(_server_url(place, options, *secrets), arguments, limit=limit) for place in places
    ]
    base = _server_url(places[0], options, parts.username or "", parts.password or "")
    return SentinelSessions(
        f"{base}/{database}", arguments, limit=limit, sentinels=sentinels, service=service
    )


def nodes_of(url: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Nodes:
    """The nodes of a cluster; none is asked yet.

    Raises:
        ConfigError: see `sessions_of`.
    """
    arguments = _arguments(url, options, defaults)
    places, parts = _places(url)
    if parts.path.strip("/"):
        raise _malformed(url, "a cluster has one database only")

    def open_sessions(address: Address) -> Sessions:
        base = _server_url(address, options, parts.username or "", parts.password or "")
        return Sessions(base, arguments, limit=options["connections"])

    return Nodes(places, open_sessions)


def _places(url: str) -> tuple[list[Address], Any]:
    """Every ``host:port`` of the URL, and its parts."""
    parts = urlsplit(url)
    default = 26379 if parts.scheme == SENTINEL else 6379
    found: list[Address] = []
    for place in parts.netloc.rpartition("@")[2].split(","):
        host, colon, port = place.rpartition(":") if ":" in place else (place, "", "")
        if not host or (colon and not port.isdigit()):
            raise _malformed(url, f"{place!r} is no host:port")
        found.append((host.strip("[]"), int(port) if colon else default))
    return found, parts


def _server_url(place: Address, options: Mapping[str, Any], user: str, password: str) -> str:
    scheme = "rediss" if options["tls"] else "redis"
    # As the parts of a URL they are still quoted.
    login = f"{_quoted(user)}:{_quoted(password)}@" if user or password else ""
    host = f"[{place[0]}]" if ":" in place[0] else place[0]
    return f"{scheme}://{login}{host}:{place[1]}"


def _quoted(text: str) -> str:
    return quote(text, safe="%")


def _arguments(url: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """redis-py's arguments beside the URL."""
    scheme = urlsplit(url).scheme
    for name, schemes in _BELONGS.items():
        if options[name] != defaults[name] and scheme not in schemes:
            raise ConfigError(
                f"option {name} is for {', '.join(f'{each}://' for each in schemes)} URLs",
                backend="redis",
                op="open",
                hint="write rediss:// for TLS; user, password and db go into a redis:// URL",
            )
    if scheme == "unix":
        given = {name: options[name] for name in ("db", "username", "password")}
    elif scheme == "rediss" or options["tls"]:
        given = {f"ssl_{name}": options[name] for name in _TLS}
    else:
        given = {}
    return {name: value for name, value in given.items() if value != ""}


def _malformed(url: str, why: str) -> ConfigError:
    form = _FORM[urlsplit(url).scheme]
    return ConfigError(why, backend="redis", op="open", hint=f"write {form}")
