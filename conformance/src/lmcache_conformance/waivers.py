"""``kv-waivers.toml``: failures that an author knows of, each with a reason and an end.

[[waiver]]
id = "H6"
reason = "the vendor's client counts round trips"
link = "https://example.org/issues/1"
expires = 2027-03-01
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lmcache_conformance.frame import Outcome, Result
from lmcache_core.sdk import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "kv-waivers.toml"
_FIELDS = {"id", "reason", "link", "expires"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """One known failure."""

    id: str
    reason: str
    link: str
    expires: datetime.date


def load(path: Path, known: Iterable[str]) -> dict[str, Waiver]:
    """Waivers by check id; none when the file is absent.

    Raises:
        ConfigError: a field is missing or unknown, or the id is of no check.
    """
    if not path.exists():
        return {}
    try:
        found = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", hint="see lmcache_conformance.waivers") from error
    ids = set(known)
    made: dict[str, Waiver] = {}
    for entry in found.get("waiver", []):
        if set(entry) != _FIELDS or not isinstance(entry["expires"], datetime.date):
            raise ConfigError(
                f"{path}: a waiver has {sorted(entry)}",
                hint="each has id, reason, link and expires = YYYY-MM-DD",
            )
        if entry["id"] not in ids or not str(entry["reason"]).strip():
            raise ConfigError(
                f"{path}: waiver of {entry['id']!r}",
                hint="name a check of this suite, and say why",
            )
        made[entry["id"]] = Waiver(**entry)
    if set(found) - {"waiver"}:
        raise ConfigError(f"{path}: unknown tables {sorted(set(found) - {'waiver'})}")
    return made


def apply(
    result: Result, waivers: Mapping[str, Waiver], today: datetime.date | None = None
) -> Result:
    """The result as it counts: a waived FAIL is WAIVED, a waived PASS fails."""
    waiver = waivers.get(result.id)
    if waiver is None:
        return result
    if (today or datetime.date.today()) > waiver.expires:
        why = f"its waiver ended on {waiver.expires}: {result.reason or 'it passes now'}"
        return replace(result, outcome=Outcome.FAIL, reason=why)
    if result.outcome is Outcome.FAIL:
        text = f"{waiver.reason} ({waiver.link}, until {waiver.expires})"
        return replace(result, outcome=Outcome.WAIVED, reason=text)
    if result.outcome is Outcome.PASS:
        return replace(
            result, outcome=Outcome.FAIL, reason=f"it is waived and passes: take it out of {FILE}"
        )
    return result
