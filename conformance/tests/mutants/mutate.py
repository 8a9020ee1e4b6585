"""Small wrong changes to a module's source, one at a time.

Left alone is what no caller can see: annotations, texts for people, what a `raise` says, counters
of metrics, None in the place of a False, and functions that only raise NotImplementedError.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_COMPARE = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_SILENT = {"message", "hint", "help", "unit", "url_help", "reason", "op", "name", "version"}
"""Keyword arguments that only tell a person something."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change: where, the line before it, what, and the whole changed source."""

    line: int
    text: str
    what: str
    source: str


def mutations(source: str, skip: frozenset[str] = frozenset()) -> Iterator[Mutation]:
    """Every mutation of ``source``; functions and classes named in ``skip`` are left alone."""
    tree = ast.parse(source)
    lines = ["", *source.splitlines()]
    for number, (node, change) in enumerate(_sites(tree, skip)):
        changed = copy.deepcopy(tree)
        twin, apply = list(_sites(changed, skip))[number]
        assert type(twin) is type(node) and change[0] == apply[0]
        apply[1]()
        ast.fix_missing_locations(changed)
        line = getattr(node, "lineno", 0)
        yield Mutation(line, lines[line].strip(), change[0], ast.unparse(changed))


Change = tuple[str, Callable[[], None]]


def _sites(tree: ast.Module, skip: frozenset[str]) -> Iterator[tuple[ast.AST, Change]]:
    for each in tree.body:
        for node in _visit(each, skip, inside=False):
            for change in _changes(node):
                yield node, change


def _visit(node: ast.AST, skip: frozenset[str], *, inside: bool) -> Iterator[ast.AST]:
    """Nodes inside functions, without annotations and texts for people."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = isinstance(node, ast.FunctionDef)
        if node.name in skip or _never_called(node):
            return
        if function:
            yield node
        for each in node.body:
            yield from _visit(each, skip, inside=function)
        return
    silent = isinstance(node, ast.keyword) and node.arg in _SILENT
    if not inside or silent or isinstance(node, (ast.JoinedStr, ast.Raise)):
        return
    yield node
    annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
    for child in ast.iter_child_nodes(node):
        if child is not annotation:
            yield from _visit(child, skip, inside=True)


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        other = _COMPARE[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", lambda: _set_op(node, other)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        swapped = _ARITHMETIC[type(node.op)]
        said = f"{type(node.op).__name__} -> {swapped.__name__}"
        yield said, lambda: setattr(node, "op", swapped())
    if isinstance(node, ast.BoolOp):
        both = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"-> {both.__name__}", lambda: setattr(node, "op", both())
    if isinstance(node, (ast.If, ast.While)):
        yield "condition negated", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        new = (not node.value) if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value!r} -> {new!r}", lambda: setattr(node, "value", new)
    if isinstance(node, ast.Return) and node.value is not None:
        nothing = isinstance(node.value, ast.Constant) and node.value.value in (None, False)
        if not nothing:
            yield "return None", lambda: setattr(node, "value", ast.Constant(None))
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, [])
        for index, each in enumerate(block if isinstance(block, list) else []):
            if _removable(each):
                yield (
                    f"removed: {ast.unparse(each).splitlines()[0][:60]}",
                    lambda f=field, i=index: getattr(node, f).__setitem__(i, ast.Pass()),
                )


def _never_called(node: ast.AST) -> bool:
    last = node.body[-1] if isinstance(node, ast.FunctionDef) else None
    return isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)


def _removable(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and not _counts(node.value)
    return isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete, ast.Break, ast.Continue))


def _counts(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "inc"


def _set_op(node: ast.Compare, other: type[ast.cmpop]) -> None:
    node.ops[0] = other()
