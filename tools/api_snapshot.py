"""The public API of `lmcache_core.sdk`, one line a name, against a committed snapshot.

A line that is gone or changed breaks backends of others: that takes a new version of the contract
(`API_VERSION`).  Then, and for new lines, renew the snapshot with ``--write``.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "docs" / "sdk-api.txt"


def lines() -> list[str]:
    """Every public name below the names in ``__all__``, with signature or value."""
    sdk = griffe.load("lmcache_core.sdk", search_paths=[str(ROOT / "lmcache-core" / "src")])
    names = sorted(str(each).strip("'\"") for each in sdk.exports or [])
    return [line for name in names for line in _describe(name, sdk[name])]


def _describe(path: str, found: griffe.Object | griffe.Alias) -> Iterator[str]:
    target = found.final_target if isinstance(found, griffe.Alias) else found
    if isinstance(target, griffe.Function):
        arguments = ", ".join(_parameters(target))
        yield f"{path}({arguments}) -> {target.returns}"
        return
    if isinstance(target, griffe.Class):
        yield f"class {path}({', '.join(map(str, target.bases))})"
        for name, member in sorted(target.members.items()):
            if not name.startswith("_") or name == "__init__":
                yield from _describe(f"{path}.{name}", member)
        return
    if isinstance(target, griffe.Attribute):
        value = "" if target.value is None else f" = {target.value}"
        yield f"{path}: {target.annotation}{value}"


def _parameters(function: griffe.Function) -> Iterator[str]:
    by_name = False
    for each in function.parameters:
        if each.name == "self":
            continue
        if each.kind is griffe.ParameterKind.keyword_only and not by_name:
            by_name = True
            yield "*"
        default = "" if each.default is None else f" = {each.default}"
        yield f"{each.name}: {each.annotation}{default}"


def main() -> int:
    """Compare, or write."""
    now = lines()
    if "--write" in sys.argv[1:]:
        SNAPSHOT.write_text("\n".join(now) + "\n")
        print(f"{len(now)} lines written to {SNAPSHOT.relative_to(ROOT)}")
        return 0
    committed = SNAPSHOT.read_text().splitlines()
    changes = list(difflib.unified_diff(committed, now, "committed", "now", lineterm="", n=0))
    if not changes:
        print(f"lmcache_core.sdk is as committed: {len(now)} lines")
        return 0
    print("\n".join(changes))
    broken = [line for line in changes[2:] if line.startswith("-")]
    print(f"\n{len(broken)} lines gone or changed; see tools/api_snapshot.py for what to do")
    return 1


if __name__ == "__main__":
    sys.exit(main())
