"""Backend URLs: ``scheme://rest?option=value``, options checked against their specs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from lmcache_core.sdk import ConfigError, OptionSpec, OptionValue

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def split_options(
    url: str, specs: Sequence[OptionSpec], backend: str
) -> tuple[str, Mapping[str, OptionValue]]:
    """``url`` without its query, and every option with its value or default, frozen.

    Raises:
        ConfigError: an unknown, repeated or malformed option.
    """
    parts = urlsplit(url)
    known = {spec.name: spec for spec in specs}
    values: dict[str, OptionValue] = {spec.name: spec.default for spec in specs}
    seen: set[str] = set()
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        spec = known.get(name)
        if spec is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known) or 'none'}"
            raise ConfigError(f"unknown option {name!r}", backend=backend, op="open", hint=hint)
        if name in seen:
            raise ConfigError(f"option {name!r} is given twice", backend=backend, op="open")
        seen.add(name)
        values[name] = _convert(spec, text, backend)
    bare = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    if not parts.netloc and url.startswith(f"{parts.scheme}:///"):
        bare = f"{parts.scheme}://{parts.path}"
    elif not parts.netloc and not parts.path:
        bare = f"{parts.scheme}://"
    return bare, MappingProxyType(values)


def redact(url: str) -> str:
    """``url`` with password and every option's value hidden, for logs and errors.

    A password may hold ``/`` and ``@`` unquoted, and may stand alone without a colon.
    """
    text = re.sub(r"(://(?!/)(?:[^/@:?]*:)?)[^?]*@", r"\1***@", url)
    return re.sub(r"([?&][^=&]+=)[^&]*", r"\1***", text)


def _convert(spec: OptionSpec, text: str, backend: str) -> OptionValue:
    value: OptionValue | None = None
    if spec.type is bool:
        lower = text.lower()
        value = True if lower in _TRUE else False if lower in _FALSE else None
    else:
        try:
            value = spec.type(text)
        except ValueError:
            value = None
    shown = "***" if spec.secret else repr(text)
    if value is None:
        raise ConfigError(
            f"option {spec.name}={shown} is not a {spec.type.__name__}",
            backend=backend,
            op="open",
            hint=spec.help,
        )
    if spec.choices and value not in spec.choices:
        raise ConfigError(
            f"option {spec.name}={shown} is not one of {list(spec.choices)}",
            backend=backend,
            op="open",
            hint=spec.help,
        )
    return value
