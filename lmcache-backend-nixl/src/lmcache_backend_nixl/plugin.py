"""Hooks of ``nixl+posix://`` and ``nixl+obj://``.  NIXL is imported at open only."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

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

POSIX, OBJ = "nixl+posix", "nixl+obj"
_MIB = 1 << 20

OPTIONS = (
    OptionSpec(
        name="build", type=str, default="auto", choices=("auto", "cu12", "cu13"),
        help="which installed build of NIXL is used",
    ),
    OptionSpec(name="lanes", type=int, default=4, help="calls at the same time, 1 to 64"),
    OptionSpec(
        name="api", type=str, default="aio", choices=("aio", "uring", "posix_aio"),
        help="the kernel's interface that nixl+posix goes through",
    ),
    OptionSpec(
        name="queue_depth", type=int, default=256, help="requests in the kernel, of nixl+posix"
    ),
    OptionSpec(
        name="direct", type=bool, default=False,
        help="O_DIRECT, of nixl+posix: past the page cache; buffers are multiples of 4 KiB",
    ),
    OptionSpec(
        name="durability", type=str, default="process", choices=("process", "host"),
        help="of nixl+posix: process survives our death; host is synced, survives power loss",
    ),
    OptionSpec(name="endpoint", type=str, default="", help="URL of the S3 service; AWS when empty"),
    OptionSpec(name="region", type=str, default="us-east-1", help="of the S3 bucket"),
    OptionSpec(
        name="access_key", type=str, default="", help="S3 access key; AWS_ACCESS_KEY_ID when empty"
    ),
    OptionSpec(
        name="secret_key", type=str, default="", secret=True,
        help="S3 secret key; AWS_SECRET_ACCESS_KEY when empty",
    ),
    OptionSpec(name="prefix", type=str, default="lmc/", help="of every object's name"),
    OptionSpec(
        name="virtual_addressing", type=bool, default=False,
        help="the bucket is a part of the S3 host's name",
    ),
    OptionSpec(
        name="max_value_bytes", type=int, default=256 * _MIB, unit="bytes",
        help="largest value of nixl+obj; each lane keeps a buffer of the largest it has moved",
    ),
)  # fmt: skip
_DEFAULTS = {spec.name: spec.default for spec in OPTIONS}
_BELONGS = {
    **dict.fromkeys(("api", "queue_depth", "direct", "durability"), POSIX),
    **dict.fromkeys(
        (
            "endpoint", "region", "access_key", "secret_key", "prefix", "virtual_addressing",
            "max_value_bytes",
        ),
        OBJ,
    ),
}  # fmt: skip


@hookimpl
def lmcache_backend_info() -> BackendInfo:
    """Describe the backend."""
    return BackendInfo(
        name="nixl",
        version=metadata.version("lmcache-backend-nixl"),
        schemes=(POSIX, OBJ),
        api_min=(0, 9),
        api_tested=API_VERSION,
        options=OPTIONS,
        url_help="nixl+posix:///absolute/directory or nixl+obj://bucket?endpoint=https://host",
    )


@hookimpl
def lmcache_probe(url: str, options: Mapping[str, Any]) -> Probe:
    """Whether NIXL is installed, and for nixl+posix whether the directory can be written.

    Nothing is loaded: whether the plugin can be is known at open, which says the fix.
    """
    scheme = url.partition(":")[0]
    found = [spec for spec in map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13")) if spec]
    extra = "obj" if scheme == OBJ else "cu12"
    fix = f"pip install 'lmcache-backend-nixl[{extra}]'"
    if not found:
        return Probe(usable=False, reason="NIXL is not installed", hint=fix)
    build = found[0].name
    library = f"libplugin_{'OBJ' if scheme == OBJ else 'POSIX'}.so"
    folder = _plugin_folder(found[0])
    if folder is not None and not (folder / library).exists():
        fix = f"{fix}; NIXL_PLUGIN_DIR, where it is set, must hold the plugins of that build"
        return Probe(usable=False, reason=f"{library} is not in {folder}", hint=fix)
    if scheme == OBJ:
        if build != "nixl_cu12":
            return Probe(usable=False, reason="the S3 plugin is in nixl-cu12 only", hint=fix)
        if importlib.util.find_spec("boto3") is None:
            return Probe(usable=False, reason="boto3 is not installed", hint=fix)
        return Probe(usable=True, reason=f"{build}; no service asked")
    try:
        path = directory_of(url, POSIX)
    except ConfigError as error:
        return Probe(usable=False, reason=error.message, hint=error.hint)
    if not writable(path):
        return Probe(
            usable=False, reason=f"{path} can't be written", hint="choose another directory"
        )
    return Probe(usable=True, reason=f"{build}; {path} can be written")


@hookimpl
def lmcache_open_connector(
    url: str, options: Mapping[str, Any], host: HostServices
) -> RemoteConnector:
    """Load NIXL and its plugin, and open the directory or the bucket."""
    from lmcache_backend_nixl.opening import open_obj, open_posix

    scheme = url.partition(":")[0]
    _check(scheme, options)
    return (open_obj if scheme == OBJ else open_posix)(url, options, host)


def _plugin_folder(spec: ModuleSpec) -> Path | None:
    """Where this build of NIXL looks for its plugins; None when that is not known."""
    given = os.environ.get("NIXL_PLUGIN_DIR")
    if given:
        return Path(given)
    if spec.origin is None:
        return None
    folder = Path(spec.origin).parent.parent / f".{spec.name}.mesonpy.libs" / "plugins"
    return folder if folder.is_dir() else None


def _check(scheme: str, options: Mapping[str, Any]) -> None:
    for name, belongs in _BELONGS.items():
        if scheme != belongs and options[name] != _DEFAULTS[name]:
            raise ConfigError(
                f"option {name} is for {belongs}://",
                backend="nixl",
                op="open",
                hint=f"remove it from the {scheme}:// URL",
            )
    limits = {
        "lanes": (1, 64),
        "queue_depth": (1, 4096),
        "max_value_bytes": (_MIB, (1 << 31) - 1),
    }
    check_ranges(options, limits, backend="nixl")
