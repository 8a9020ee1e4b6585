"""Rows of ``lmc backends``."""

from __future__ import annotations

from typing import Any

from lmcache_core import plugins
from lmcache_core.sdk import Capabilities, ConfigError


def backend_rows() -> list[dict[str, Any]]:
    """One row a scheme.  Capabilities are those that the backend declares on its class; a
    backend that knows them only when open shows none.

    Raises:
        ConfigError: two packages claim one scheme.
    """
    return [_row(ref) for ref in plugins.installed().values()]


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
        return {**row, "broken": True, "reason": str(error)}
    probe = plugins.probe(f"{ref.scheme}:///")
    reason = probe.reason + (f" ({probe.hint})" if probe.hint else "")
    declared = backend.info.capabilities
    return {
        **row,
        "usable": probe.usable,
        "capabilities": _claims(declared) if declared else [],
        "url": backend.info.url_help,
        "options": [option.name for option in backend.info.options],
        "reason": reason,
    }


def _claims(capabilities: Capabilities) -> list[str]:
    flags = ("zero_copy", "regions", "leases", "scan", "submit", "evicts", "capacity_reported")
    claims = [flag for flag in flags if getattr(capabilities, flag)]
    return [
        *claims,
        f"durability={capabilities.durability.value}",
        f"sharing={capabilities.sharing.value}",
    ]
