"""The API reference of docs/controller.md, from the controller's own table and types.

With ``--write`` it renews the docs; else it prints.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec

from lmcache_core.controller import messages
from lmcache_core.controller.openapi import reference_markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "controller.md"
BEGIN, END = "<!-- reference: tools/controller_reference.py --write -->\n", "<!-- /reference -->\n"


def reference() -> str:
    """Operations, and every type with its fields."""
    types = [_described(kind) for kind in _types()]
    return "\n".join(["### Operations\n", reference_markdown(), "### Types\n", *types])


def renewed(text: str) -> str:
    """``text`` of the docs with the reference as it is now."""
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise SystemExit(f"{DOCS} lacks the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{reference()}\n{END}{tail}"


def _types() -> list[type[msgspec.Struct]]:
    """Requests and answers, in the order of their file."""
    found = vars(messages).values()
    structs = [
        kind for kind in found if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    ]
    return [kind for kind in structs if not kind.__name__.startswith("_")]


def _described(kind: type[msgspec.Struct]) -> str:
    text, _, attributes = inspect.getdoc(kind).partition("Attributes:")  # type: ignore[union-attr]
    said = dict(re.findall(r"^    (\w+): (.*(?:\n      .*)*)", attributes, re.MULTILINE))
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(kind):
        default = "" if field.required else f"`{_default(field)}`"
        note = " ".join(said.get(field.name, "").split()).replace("``", "`")
        rows.append(f"| `{field.name}` | {_type(field.type)} | {default} | {note} |")
    sentence = " ".join(text.split()).replace("``", "`")
    return f"**{kind.__name__}**: {sentence}\n\n" + "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.json.encode(field.default_factory()).decode()
    return msgspec.json.encode(field.default).decode()


def _type(kind: Any) -> str:
    """As JSON has it, with its bounds."""
    if get_origin(kind) is Annotated:
        inner, *metas = get_args(kind)
        bounds = " ".join(_bounds(meta) for meta in metas)
        return f"{_type(inner)} {bounds}".strip()
    args = get_args(kind)
    if get_origin(kind) is list:
        return f"list of {_type(args[0])}"
    if get_origin(kind) is dict:
        return f"{_type(args[0])} → {_type(args[1])}"
    if args and type(None) in args:
        return " or ".join([_type(arg) for arg in args if arg is not type(None)] + ["null"])
    if args:  # Literal
        return " or ".join(f"`{arg}`" for arg in args)
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return names.get(kind) or kind.__name__


def _bounds(meta: msgspec.Meta) -> str:
    said = []
    if meta.pattern is not None:
        said.append("`" + meta.pattern.replace("|", "\\|") + "`")
    for sign, bound in (("≥", meta.ge), (">", meta.gt), ("≤", meta.le), ("<", meta.lt)):
        if bound is not None:
            said.append(f"{sign} {bound:,}")
    if meta.max_length is not None:
        said.append(f"(at most {meta.max_length:,})")
    return " ".join(said)


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        DOCS.write_text(renewed(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(reference())


if __name__ == "__main__":
    main()
