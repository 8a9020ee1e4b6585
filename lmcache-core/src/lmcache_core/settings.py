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
from lmcache_core.lmcache_keys import KEYS, RENAMED, TIER_DETAILS, asks_for_nothing, translate
from lmcache_core.logs import logger
from lmcache_core.sdk import ConfigError

CONFIG_FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
_PREFIX = "LMCACHE_"
OWN_KEYS = tuple(field.name for field in msgspec.structs.fields(EngineConfig))
_EXTRA = "kv_connector_extra_config"
_THEIR_PREFIX = "lmcache."
"""LMCache marks its keys with it in the engine's extra configuration."""


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
        _add(values, sources, _read_yaml(Path(path)), path)
    for name, value in _variables(environ, warnings).items():
        _add(values, sources, {name: value}, f"variable {_PREFIX}{name.upper()}")
    plain = [(str(key).removeprefix(_THEIR_PREFIX), value) for key, value in (extra or {}).items()]
    if len(dict(plain)) < len(plain):
        raise ConfigError(
            f"{_EXTRA}: a key stands there with and without {_THEIR_PREFIX}", hint="keep one"
        )
    _add(values, sources, dict(plain), _EXTRA)
    return _settle(values, sources, warnings)


def _add(
    values: dict[str, Any], sources: dict[str, str], found: Mapping[Any, Any], source: str
) -> None:
    """Lay one source over those before it.  The host tier counts as ``host_bytes``, so that a
    later source can change it alone."""
    new: dict[str, Any] = {}
    for written, value in found.items():
        name = RENAMED.get(str(written), str(written))
        parts = {name: value}
        if name == "tiers" and isinstance(value, (list, tuple)) and value:
            first = value[0]
            if isinstance(first, Mapping) and set(first) == {"host"}:
                parts = {"host_bytes": first["host"], "tiers": value[1:]}
        for key, part in parts.items():
            if key in new:
                raise ConfigError(
                    f"{source}: {key} is given twice, which say the same thing", hint="keep one"
                )
            new[key] = part
    values |= new
    sources |= dict.fromkeys(new, source)


def _settle(values: dict[str, Any], sources: dict[str, str], warnings: list[str]) -> Settings:
    for name in values:
        if name not in OWN_KEYS and name not in KEYS:
            near = difflib.get_close_matches(name, [*OWN_KEYS, *KEYS], 1)
            hint = f"did you mean {near[0]!r}?" if near else "lmc config show lists every key"
            raise ConfigError(f"{sources[name]}: unknown key {name!r}", hint=hint)
    own = {name: value for name, value in values.items() if name in OWN_KEYS}
    try:
        translated = translate(values)
    except ConfigError as error:
        raise _with_source(error, sources) from None
    made_from = translated.made_from
    details = [
        ("tiers", name)
        for name in TIER_DETAILS
        if values.get(name) and not asks_for_nothing(name, values[name])
    ]
    for ours, other in [*made_from.items(), *details]:
        if ours in own:
            # Two names for one thing would make one of them silently lose.
            raise ConfigError(
                f"{ours} ({sources[ours]}) and {other} ({sources[other]}) say the same thing",
                hint=f"keep one of them; {ours} can say more" if ours == "tiers" else "keep one",
            )
    named = {name: sources[name] for name in own}
    named |= {ours: f"{sources[theirs]} ({theirs})" for ours, theirs in made_from.items()}
    settled = {**translated.values, **own}
    for name, value in settled.items():
        # One by one first, so that a mistake is named with its source.
        try:
            from_mapping({name: value})
        except ConfigError as error:
            raise ConfigError(f"{named[name]}: {error.message}", hint=error.hint) from None
    return Settings(from_mapping(settled), named, (*warnings, *translated.warnings))


def _with_source(error: ConfigError, sources: Mapping[str, str]) -> ConfigError:
    """``error`` with the place of the key that it names."""
    names = re.findall(r"\w+", error.message)
    place = next((sources[name] for name in names if name in sources), "")
    return ConfigError(f"{place}: {error.message}", hint=error.hint) if place else error


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
        if text.strip():
            found[name] = _parse(
                text,
                f"variable {variable}",
                f"write it like {variable}=256 or {variable}='[{{host: 20GiB}}]'",
            )
    return found


def _read_yaml(path: Path) -> dict[Any, Any]:
    hint = f"fix the file or unset {CONFIG_FILE_VARIABLE}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}", hint=hint) from error
    loaded = _parse(text, str(path), hint)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} is not a mapping", hint="write 'key: value' lines")
    return loaded


def _parse(text: str, source: str, hint: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
        # The parser's own words quote the text around, which may hold a password.
        raise ConfigError(f"{source}{place}: not YAML", hint=hint) from None
