"""Rows of ``lmc config show`` and ``lmc config keys``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lmcache_core.config import TierConfig
from lmcache_core.lmcache_keys import KEYS, Key
from lmcache_core.settings import CONFIG_FILE_VARIABLE, Settings, load_settings
from lmcache_core.url import redact

Row = dict[str, Any]


def settings_from(file: Path | None, environ: Mapping[str, str]) -> Settings:
    """What an engine started in this environment would take, with ``file`` in the place of
    the variable's.

    Raises:
        ConfigError: see `lmcache_core.settings.load_settings`.
    """
    changed = dict(environ)
    if file is not None:
        changed[CONFIG_FILE_VARIABLE] = str(file)
    return load_settings({}, changed)


def setting_rows(settings: Settings) -> list[Row]:
    """One row a key, tiers one by one; passwords and options of URLs are hidden."""
    rows: list[Row] = []
    for name in settings.config.__struct_fields__:
        source = settings.sources.get(name, "default")
        if name == "tiers":
            for position, tier in enumerate(settings.config.tiers):
                plain = msgspec.to_builtins(TierConfig(url=""))
                shown = msgspec.to_builtins(tier) | {"url": redact(tier.url)}
                rows += [
                    {
                        "key": f"tiers[{position}].{key}",
                        "value": value,
                        "source": "default" if value == plain[key] else source,
                    }
                    for key, value in shown.items()
                ]
            continue
        rows.append({"key": name, "value": getattr(settings.config, name), "source": source})
    return rows


def key_rows() -> list[Row]:
    """LMCache's settings and what becomes of each."""
    return [{"key": k.name, "fate": k.fate, "note": k.note} for k in sorted_keys()]


def key_table() -> str:
    """`key_rows` as the table of docs/configuration.md."""
    lines = ["| LMCache 0.5.6 | here | |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {key.fate} | {key.note} |" for key in sorted_keys()]
    return "\n".join(lines) + "\n"


def sorted_keys() -> list[Key]:
    """LMCache's keys: mapped, refused, ignored, each by name."""
    order = ("mapped", "refused", "ignored")
    return sorted(KEYS.values(), key=lambda key: (order.index(key.fate), key.name))
