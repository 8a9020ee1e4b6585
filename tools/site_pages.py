"""Hooks of mkdocs: the READMEs and the reference as pages, and links that hold in both places.

The texts are written to be read in the repository; here their links are turned to the pages that
they have become.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TAKEN = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    **{
        f"backends/{name}.md": f"lmcache-backend-{name}/README.md"
        for name in ("redis", "mooncake", "infinistore", "gds", "nixl")
    },
}
"""Page -> the file outside of docs that it shows."""
CONTRACT = {
    "Connectors": ("connector", "capabilities", "buffers", "status", "errors"),
    "Finding and opening": ("hookspecs", "api"),
    "Helpers": (
        "batch", "base", "guarded", "abandoning", "workers", "value_files", "fileops", "ranges",
    ),
    "Channels": ("channel", "grants", "links", "handshake"),
    "Codecs": ("codec",),
}  # fmt: skip
"""Part of the contract's reference -> the modules that it shows, in its order."""
_PAGE_OF = {source: page for page, source in TAKEN.items()}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages whose text lies elsewhere."""
    for page, source in TAKEN.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    files.append(File.generated(config, "reference/sdk.md", content=contract()))
    suite = "# The suite\n\n::: lmcache_conformance\n"
    files.append(File.generated(config, "reference/suite.md", content=suite))
    return files


def contract() -> str:
    """The reference of `lmcache_core.sdk`: what it exports, in parts.

    Raises:
        ValueError: it exports a name of a module that is in no part.
    """
    tree = ast.parse((ROOT / "lmcache-core/src/lmcache_core/sdk/__init__.py").read_text("utf-8"))
    exported = {
        (node.module or "").rpartition(".")[2]: [name.name for name in node.names]
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
    }
    placed = [module for modules in CONTRACT.values() for module in modules]
    if set(placed) != set(exported):
        raise ValueError(f"in no part of CONTRACT: {sorted(set(exported) ^ set(placed))}")
    lines = ["# The contract", "", ast.get_docstring(tree) or "", ""]
    for part, modules in CONTRACT.items():
        lines += [f"## {part}", ""]
        for module in modules:
            lines += [f"::: lmcache_core.sdk.{module}", "    options:", "      members:"]
            lines += [f"        - {name}" for name in exported[module]]
            lines += ["      heading_level: 3", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository to links between pages."""
    here = page.file.src_uri
    source = TAKEN.get(here, f"docs/{here}")

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target:
            return link[0]
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = _PAGE_OF.get(meant, meant.removeprefix("docs/"))
        if goal == meant and (ROOT / meant).is_file():
            return text  # source text, which the site does not show
        return f"[{text}]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(turned, markdown)
