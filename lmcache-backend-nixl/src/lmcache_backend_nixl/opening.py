"""From a URL and its options to an open connector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from lmcache_backend_nixl.bucket import Bucket
from lmcache_backend_nixl.library import Agent, load
from lmcache_backend_nixl.obj import ObjConnector
from lmcache_backend_nixl.posix import PosixConnector
from lmcache_core.sdk import ConfigError, HostServices, RemoteConnector, ValueFiles, directory_of

_PIECES = 4096
"""Requests that one transfer may consist of; `max_batch` files are far fewer."""


def open_posix(url: str, options: Mapping[str, Any], host: HostServices) -> RemoteConnector:
    """Open a directory.

    Raises:
        ConfigError: NIXL or its plugin is missing, or the directory can't be used.
    """
    directory = directory_of(url, "nixl+posix")
    api = load("POSIX", options["build"])
    parameters = {
        f"use_{options['api']}": "true",
        "kernel_queue_size": str(options["queue_depth"]),
        # The plugin's own default takes megabytes for every agent.
        "ios_pool_size": str(_PIECES),
    }

    def make() -> Agent:
        return Agent(api, "POSIX", parameters)

    # A plugin that does not load is an error at open, not at the first put.
    make().close()
    sync = options["durability"] == "host"
    files = ValueFiles(directory, backend="nixl+posix", sync=sync)
    return PosixConnector(files, make, lanes=options["lanes"], direct=options["direct"], host=host)


def open_obj(url: str, options: Mapping[str, Any], host: HostServices) -> RemoteConnector:
    """Open a bucket, and ask whether it is there.

    Raises:
        ConfigError: NIXL, its plugin, boto3 or credentials are missing, or the bucket.
        BackendUnavailable: the service does not answer.
    """
    parts = urlsplit(url)
    if not parts.hostname or parts.path.strip("/") or parts.username or parts.port:
        raise ConfigError(
            "the URL names no bucket",
            backend="nixl",
            op="open",
            hint="write nixl+obj://bucket?endpoint=https://host",
        )
    endpoint = options["endpoint"]
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"endpoint {endpoint!r} is no http:// or https:// URL", backend="nixl", op="open",
            hint="write endpoint=https://host[:port]",
        )  # fmt: skip
    bucket = Bucket(parts.netloc, options)
    try:
        bucket.check()
        api = load("OBJ", options["build"])

        def make() -> Agent:
            return Agent(api, "OBJ", bucket.parameters)

        make().close()
    except BaseException:
        bucket.close()
        raise
    return ObjConnector(
        bucket,
        make,
        lanes=options["lanes"],
        max_value_bytes=options["max_value_bytes"],
        host=host,
    )
