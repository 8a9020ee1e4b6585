"""Rows of ``lmc backends``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache_core import plugins
from lmcache_core.sdk import Capabilities, ConfigError

_PROBES_AT_ONCE = 4


def backend_rows() -> list[dict[str, Any]]:
    """One row a scheme.  Capabilities are those that the backend declares on its class; a
    backend that knows them only when open shows none.

    Raises:
        ConfigError: two packages claim one scheme.
    """
    refs = plugins.installed().values()
    # Each probe is a process of its own.
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        return list(pool.map(_row, refs))


def missing_rows() -> list[dict[str, str]]:
    """Schemes and install command of each backend of this project that is not installed.

    Raises:
        ConfigError: two packages claim one scheme.
    """
    installed = plugins.installed()
    schemes: dict[str, list[str]] = {}
    for scheme in plugins.KNOWN:
        if scheme not in installed:
            schemes.setdefault(plugins.install_line(scheme), []).append(f"{scheme}://")
    return [{"schemes": ", ".join(own), "install": line} for line, own in schemes.items()]


def _row(ref: plugins.BackendRef) -> dict[str, Any]:
    row: dict[str, Any] = {
        "scheme": ref.scheme,
        "package": ref.distribution,
        "version": ref.version,
        "usable": False,
        "broken": False,
        "capabilities": [],
    }
    try:
        backend = plugins.load(ref.scheme)
    except ConfigError as error:
        return {**row, "broken": True, "reason": error.message, "hint": error.hint}
    probe = plugins.probe(f"{ref.scheme}:///")
    declared = backend.info.capabilities
    return {
        **row,
        "usable": probe.usable,
        "capabilities": _claims(declared) if declared else [],
        "url": backend.info.url_help,
        "options": [option.name for option in backend.info.options],
        "reason": probe.reason,
        "hint": probe.hint,
    }


def _claims(capabilities: Capabilities) -> list[str]:
    flags = ("zero_copy", "regions", "leases", "scan", "submit", "evicts", "capacity_reported")
    claims = [flag for flag in flags if getattr(capabilities, flag)]
    return [
        *claims,
        f"durability={capabilities.durability.value}",
        f"sharing={capabilities.sharing.value}",
    ]
