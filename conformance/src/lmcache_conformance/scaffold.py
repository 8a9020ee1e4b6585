"""A new backend's files, and the reference page of the checks."""

from __future__ import annotations

import re
from pathlib import Path

from lmcache_conformance.channels import CHANNEL_CHECKS
from lmcache_conformance.checks import CHECKS
from lmcache_conformance.codecs import CODEC_CHECKS
from lmcache_core.sdk import ConfigError

_TEMPLATE = Path(__file__).with_name("template")
_FAMILIES = {
    "A": "What a backend says of itself", "B": "One key", "C": "Batches", "D": "Sizes",
    "E": "Keys", "F": "Concurrency and close", "G": "Ownership of memory", "H": "Faults",
    "I": "Durability", "J": "Capacity and leases", "K": "Like a dictionary", "L": "Leaks",
    "Z": "Zero copy, regions, submit", "P": "Performance (reported only)",
    "X": "Codecs (a run of their own)", "T": "Channels (a run of their own)",
}  # fmt: skip


def write(name: str, folder: Path) -> list[Path]:
    """Write a backend called ``name`` into ``folder``; the files made.

    Raises:
        ConfigError: the name is no URL scheme, or the folder has something in it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ConfigError(f"{name!r} is no name", hint="lower-case letters and digits: mystore")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", hint="name a folder that does not exist yet")
    made = []
    for source in sorted(_TEMPLATE.rglob("*.txt")):
        relative = str(source.relative_to(_TEMPLATE)).removesuffix(".txt").replace("NAME", name)
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text().replace("@Name@", name.capitalize()).replace("@name@", name)
        target.write_text(text)
        made.append(target)
    return made


def reference() -> str:
    """The reference page, in Markdown."""
    lines = []
    for family, title in _FAMILIES.items():
        lines += [f"### {family}: {title}", "", "| id | rule | profile | when it fails |"]
        lines += ["|---|---|---|---|"]
        for check in (*CHECKS, *CODEC_CHECKS, *CHANNEL_CHECKS):
            if check.id[0] == family:
                profile = check.profile.value + (", full plan only" if check.full_only else "")
                cells = (check.id, check.rule, profile, check.fix)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
