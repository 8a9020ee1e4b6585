"""Puts the example's files into docs/write-a-backend.md; ``--check`` only compares."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "write-a-backend.md"
EXAMPLE = ROOT / "examples" / "third_party_backend"
_BLOCK = re.compile(r"<!-- (\S+) -->\n```(\w+)\n.*?\n```", re.S)


def rendered(text: str) -> str:
    """The page with every named block as its file is now."""

    def block(found: re.Match[str]) -> str:
        content = (EXAMPLE / found[1]).read_text().rstrip()
        return f"<!-- {found[1]} -->\n```{found[2]}\n{content}\n```"

    return _BLOCK.sub(block, text)


def main() -> int:
    """Write, or compare."""
    now = PAGE.read_text()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(rendered(now))
        return 0
    if rendered(now) != now:
        print("docs/write-a-backend.md is not the example's code; run: python tools/tutorial.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
