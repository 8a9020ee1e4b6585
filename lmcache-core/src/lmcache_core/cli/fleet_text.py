"""How fleet commands write what a controller says: sizes, times, and text that others chose."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import typer

from lmcache_core.cli.show import show_rows

MAX_TEXT_CHARS = 600
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def plain(text: str) -> str:
    """``text`` without what steers a terminal, and not longer than a message should be: names come
    from instances, and a terminal obeys what it is sent."""
    cut = text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def pretty(body: bytes) -> str:
    """JSON as it came, with line breaks; bytes that some terminals obey are escaped, which in JSON
    says the same."""
    text = msgspec.json.format(body, indent=1).decode()
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def size(nbytes: float) -> str:
    """Like ``1.5 GiB``."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    power = 1
    while nbytes >= 1024 ** (power + 1) and power < len(_UNITS):
        power += 1
    return f"{nbytes / 1024**power:.1f} {_UNITS[power - 1]}"


def duration(seconds: float) -> str:
    """Like ``12.3 s``, ``4 min`` or ``2 h 5 min``."""
    if seconds < 100:
        return f"{max(seconds, 0):.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def ago(unix_s: float) -> str:
    """How long since ``unix_s``, of this machine's clock."""
    return f"{duration(time.time() - unix_s)} ago"


def clock(unix_s: float) -> str:
    """Local date and time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
    except (OverflowError, ValueError, OSError):
        return f"{unix_s:.0f}"


def counted(number: int, noun: str) -> str:
    """``1 chunk``, ``1,200 chunks``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def counts(what: Mapping[str, int]) -> str:
    """``3 no_room, 1 gone``, most first."""
    rows = sorted(what.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} {plain(name)}" for name, number in rows)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, empty: str) -> None:
    """Print ``rows``, or ``empty`` when there are none."""
    if not rows:
        typer.echo(empty)
        return
    cleaned = [
        {name: plain(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]
    show_rows(cleaned, columns, False)


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, those that there are."""
    rows = [{"what": name, "value": value} for name, value in pairs if value]
    table(rows, ["what", "value"], empty="")
