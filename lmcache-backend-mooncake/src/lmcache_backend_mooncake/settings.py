"""The options, checked: what a connector and its helper go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from lmcache_core.sdk import ConfigError, OptionSpec, check_ranges

MIB = 1 << 20
URL_HELP = "mooncake://master_host:port"

OPTIONS = (
    OptionSpec(
        name="protocol", type=str, default="tcp", choices=("tcp", "rdma"),
        help="how values travel between clients",
    ),
    OptionSpec(
        name="rdma_devices", type=str, default="",
        help="RDMA devices, separated by commas, such as mlx5_0; empty lets Mooncake choose",
    ),
    OptionSpec(
        name="metadata_server", type=str, default="P2PHANDSHAKE",
        help="P2PHANDSHAKE, or the URL of the metadata server that all clients use",
    ),
    OptionSpec(
        name="local_hostname", type=str, default="",
        help="address of this host for the others; empty takes the one that faces the master",
    ),
    OptionSpec(
        name="segment_bytes", type=int, default=0, unit="bytes",
        help="memory that this connector lends to the store; it ends with the connector",
    ),
    OptionSpec(
        name="local_buffer_bytes", type=int, default=0, unit="bytes",
        help="the library's own staging memory; none is needed for get_into and put_from",
    ),
    OptionSpec(
        name="ssd_offload_path", type=str, default="",
        help="directory that lent memory overflows to; the master needs -enable_offload=true",
    ),
    OptionSpec(name="replicas", type=int, default=1, help="copies of a value, as many as possible"),
    OptionSpec(
        name="pin", type=str, default="none", choices=("none", "soft", "hard"),
        help="soft: evicted last; hard: never evicted, only deleted",
    ),
    OptionSpec(
        name="soft_pin_ttl_s", type=float, default=1800.0, unit="s",
        help="how long a soft pin lasts after the last use",
    ),
    OptionSpec(name="max_concurrency", type=int, default=4, help="calls at the same time"),
    OptionSpec(
        name="max_late_calls", type=int, default=8,
        help="calls past their deadline that may still run; then the store is unavailable",
    ),
    OptionSpec(
        name="stuck_after_s", type=float, default=60.0, unit="s",
        help="a call that runs so long past its deadline ends with the helper process",
    ),
)  # fmt: skip

_RANGES = {
    "segment_bytes": (0, 1 << 44),
    "local_buffer_bytes": (0, 1 << 40),
    "replicas": (1, 64),
    "soft_pin_ttl_s": (1, 86400),
    "max_concurrency": (1, 64),
    "max_late_calls": (1, 64),
    "stuck_after_s": (1, 3600),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator said; fields as `OPTIONS` names them."""

    master: tuple[str, int]
    protocol: str
    rdma_devices: str
    metadata_server: str
    local_hostname: str
    segment_bytes: int
    local_buffer_bytes: int
    ssd_offload_path: str
    replicas: int
    pin: str
    soft_pin_ttl_s: float
    max_concurrency: int
    max_late_calls: int
    stuck_after_s: float

    def as_json(self) -> dict[str, Any]:
        """For the helper."""
        return asdict(self)


def read_settings(url: str, options: Mapping[str, Any]) -> Settings:
    """
    Raises:
        ConfigError: the URL names no master, or an option is out of range.
    """
    check_ranges(options, _RANGES, backend="mooncake")
    if 0 < options["segment_bytes"] < 16 * MIB:
        raise _wrong("segment_bytes is too small to be lent", f"give 0, or at least {16 * MIB}")
    if options["ssd_offload_path"] and not options["segment_bytes"]:
        raise _wrong(
            "ssd_offload_path without lent memory",
            "set segment_bytes too, or give the path to lmcache_backend_mooncake.segment",
        )
    return Settings(master=master_of(url), **options)


def master_of(url: str) -> tuple[str, int]:
    """
    Raises:
        ConfigError: the URL is none of ours.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _wrong(f"the URL can't be read: {error}", URL_HELP) from error
    if not host or not port or parts.path.strip("/") or parts.username or parts.password:
        raise _wrong("the URL must name the master's host and port, and nothing else", URL_HELP)
    return host, port


def _wrong(message: str, hint: str) -> ConfigError:
    return ConfigError(message, backend="mooncake", op="open", hint=hint)
