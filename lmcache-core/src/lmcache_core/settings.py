"""Where settings come from, later ones win: defaults, the YAML file that LMCACHE_CONFIG_FILE
names, LMCACHE_* variables, and the engine's own extra configuration (vLLM's
``kv_connector_extra_config``).  LMCache's own keys are understood in each.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from lmcache_core.config import EngineConfig, from_mapping
from lmcache_core.lmcache_keys import KEYS, TIER_KEYS, translate
from lmcache_core.logs import logger
from lmcache_core.sdk import ConfigError

CONFIG_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
_PREFIX = "LMCACHE_"
OWN_KEYS = tuple(field.name for field in msgspec.structs.fields(EngineConfig))
_HOST = ("host_bytes", "max_local_cpu_size")


@dataclass(frozen=True, slots=True)
class Settings:
    """An effective configuration.

    Attributes:
        config: the values.
        sources: key of `EngineConfig` -> where its value comes from; absent for defaults.
        warnings: what was ignored, and why.
    """

    config: EngineConfig
    sources: dict[str, str]
    warnings: tuple[str, ...]


def load_config(extra: Mapping[str, Any] | None = None) -> EngineConfig:
    """The effective configuration; logs what was ignored.

    Raises:
        ConfigError: see `load_settings`.
    """
    settings = load_settings(extra)
    for text in settings.warnings:
        logger.warning("%s", text)
    return settings.config


def load_settings(
    extra: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The effective configuration with the source of every value.

    Raises:
        ConfigError: an unreadable file, an unknown key (with the nearest name), a value of the
            wrong type, an LMCache key that can't be honoured; says where it stands.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    warnings: list[str] = []
    if path := environ.get(CONFIG_FILE_VARIABLE):
        found = _read_yaml(Path(path))
        values |= found
        sources |= {str(key): path for key in found}
    for name, value in _variables(environ, warnings).items():
        values[name] = value
        sources[name] = f"variable {_PREFIX}{name.upper()}"
    values |= extra or {}
    sources |= {str(key): "kv_connector_extra_config" for key in extra or {}}
    return _settle(values, sources, warnings)


def _settle(values: dict[str, Any], sources: dict[str, str], warnings: list[str]) -> Settings:
    for name in values:
        if name not in OWN_KEYS and name not in KEYS:
            near = difflib.get_close_matches(str(name), [*OWN_KEYS, *KEYS], 1)
            hint = f"did you mean {near[0]!r}?" if near else "lmc config show lists every key"
            raise ConfigError(f"{sources[name]}: unknown key {name!r}", hint=hint)
    own = {name: value for name, value in values.items() if name in OWN_KEYS}
    try:
        translated = translate(values)
        _refuse_collisions(values, sources)
        config = from_mapping({**translated.values, **own})
    except ConfigError as error:
        raise _with_source(error, values, sources) from None
    named = {name: source for name, source in sources.items() if name in OWN_KEYS}
    for ours, theirs in translated.made_from.items():
        named.setdefault(ours, f"{sources[theirs]} ({theirs})")
    if "tiers" in own and any("host" in t for t in own["tiers"] if isinstance(t, Mapping)):
        named["host_bytes"] = sources["tiers"]
    return Settings(config, named, (*warnings, *translated.warnings))


def _refuse_collisions(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Two names for one thing would make one of them silently lose."""
    tiers = values.get("tiers")
    host_tier = isinstance(tiers, (list, tuple)) and any(
        isinstance(tier, Mapping) and "host" in tier for tier in tiers
    )
    pairs = [("tiers", name) for name in TIER_KEYS if tiers and values.get(name)]
    pairs += [("tiers", name) for name in _HOST if host_tier and values.get(name)]
    pairs += [_HOST] if all(values.get(name) for name in _HOST) else []
    for ours, other in pairs:
        raise ConfigError(
            f"{ours} ({sources[ours]}) and {other} ({sources[other]}) say the same thing",
            hint=f"keep one of them; {ours} can say more" if ours == "tiers" else "keep one",
        )


def _with_source(
    error: ConfigError, values: Mapping[str, Any], sources: Mapping[str, str]
) -> ConfigError:
    """``error`` with the place of the key that it names."""
    names = re.findall(r"\w+", error.message)
    place = next((sources[name] for name in names if name in values), "")
    if not place or place in error.message:
        return error
    return ConfigError(f"{place}: {error.message}", hint=error.hint)


def _variables(environ: Mapping[str, str], warnings: list[str]) -> dict[str, Any]:
    """Settings among the variables, as YAML values.

    Others write ``LMCACHE_*`` too (LMCache itself, Kubernetes for services), so only a name
    close to one of ours is an error.
    """
    found: dict[str, Any] = {}
    known = [*OWN_KEYS, *KEYS]
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable == CONFIG_FILE_VARIABLE:
            continue
        name = variable.removeprefix(_PREFIX).lower()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.85)
            if near:
                raise ConfigError(
                    f"unknown variable {variable}",
                    hint=f"did you mean {_PREFIX}{near[0].upper()}?",
                )
            warnings.append(f"the variable {variable} is ignored: it is no setting")
            continue
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"variable {variable} is not a YAML value: {error}",
                hint=f"write it like {variable}=256 or {variable}='[{{host: 20GiB}}]'",
            ) from error
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} can't be read: {error}", hint=f"fix the file or unset {CONFIG_FILE_VARIABLE}"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} is not a mapping", hint="write 'key: value' lines")
    return loaded
