"""``nixl+ucx://`` as an entry point of ``lmcache.channels.v1``.  NIXL is imported at open only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from lmcache_backend_nixl.plugin import _plugin_folder
from lmcache_core.sdk import (
    ChannelHost,
    ChannelPlugin,
    OptionSpec,
    OptionValue,
    Probe,
    TransferChannel,
    check_ranges,
)

SCHEME = "nixl+ucx"
_LIBRARY = "libplugin_UCX.so"

OPTIONS = (
    OptionSpec(
        name="build", type=str, default="auto", choices=("auto", "cu12", "cu13"),
        help="which installed build of NIXL is used",
    ),
    OptionSpec(name="max_peers", type=int, default=64, help="connected at a time, 1 to 1024"),
    OptionSpec(
        name="max_transfers", type=int, default=64,
        help="to one peer at the same time, 1 to 1024; abandoned ones count until they end",
    ),
)  # fmt: skip
_LIMITS = {"max_peers": (1, 1024), "max_transfers": (1, 1024)}


def probe() -> Probe:
    """Whether a build of NIXL with its UCX plugin is installed.  Nothing is loaded."""
    found = [spec for spec in map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13")) if spec]
    fix = "pip install 'lmcache-backend-nixl[cu12]'"
    if not found:
        return Probe(usable=False, reason="NIXL is not installed", hint=fix)
    folder = _plugin_folder(found[0])
    if folder is not None and not (folder / _LIBRARY).exists():
        fix = f"{fix}; NIXL_PLUGIN_DIR, where it is set, must hold the plugins of that build"
        return Probe(usable=False, reason=f"{_LIBRARY} is not in {folder}", hint=fix)
    return Probe(usable=True, reason=f"{found[0].name}; no device asked")


def open_channel(
    url: str, options: Mapping[str, OptionValue], host: ChannelHost
) -> TransferChannel:
    """Load NIXL and listen.

    Raises:
        ConfigError: the URL or an option is wrong, or NIXL can't be loaded.
        BackendUnavailable: the address can't be listened at.
    """
    check_ranges(options, _LIMITS, backend=SCHEME)
    from lmcache_backend_nixl.channel import NixlChannel

    return NixlChannel(
        url,
        host,
        build=str(options["build"]),
        max_peers=int(options["max_peers"]),
        max_transfers=int(options["max_transfers"]),
    )


plugin = ChannelPlugin(scheme=SCHEME, open=open_channel, options=OPTIONS, probe=probe)
