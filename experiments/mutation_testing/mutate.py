"""Every changed operator, number, condition or statement of a module.

Annotations and what only words a message are left alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

COMPARED: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
WORDS = ("expected", "found", "remedy")
"""Arguments of a finding that are for people to read."""

Path_ = tuple[Any, ...]


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, Path_, ast.AST]]:
    """(line, what was changed, where, the new node) for every place and change."""
    for path, node in _places(tree, ()):
        for changed in _changes(node):
            yield node.lineno, _words(tree, path, changed), path, changed


def _words(tree: ast.Module, path: Path_, changed: ast.AST) -> str:
    """A change; of a number, what it stands in."""
    at = path
    if isinstance(changed, ast.Constant):
        at = path[: -2 if isinstance(path[-1], int) else -1]
        if not isinstance(_at(tree, at), ast.expr):
            at = path
    before = _at(tree, at)
    after = deepcopy(before) if at != path else changed
    if at != path:
        put(after, path[len(at) :], changed)
    return f"{ast.unparse(before)} → {ast.unparse(after)}"


def _at(tree: ast.AST, path: Path_) -> Any:
    """What is there."""
    found: Any = tree
    for step in path:
        found = found[step] if isinstance(step, int) else getattr(found, step)
    return found


def put(tree: ast.AST, path: Path_, node: ast.AST) -> None:
    """A new node in place of the one there."""
    holder = _at(tree, path[:-1])
    if isinstance(last := path[-1], int):
        holder[last] = node
    else:
        setattr(holder, last, node)
    ast.fix_missing_locations(tree)


def _places(node: ast.AST, path: Path_) -> Iterator[tuple[Path_, Any]]:
    """Every expression and statement that may be changed."""
    if isinstance(node, (ast.expr, ast.stmt)) and path:
        yield path, node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "names", "type_params"):
            continue
        if isinstance(node, ast.keyword) and node.arg in WORDS:
            continue
        if isinstance(node, ast.JoinedStr):
            continue
        several = value if isinstance(value, list) else [value]
        for number, child in enumerate(several):
            if isinstance(child, ast.AST):
                step = (name, number) if isinstance(value, list) else (name,)
                yield from _places(child, (*path, *step))


def _changes(node: Any) -> Iterator[ast.AST]:
    def like(**fields: Any) -> ast.AST:
        return ast.copy_location(
            type(node)(
                **{**{n: deepcopy(v) for n, v in ast.iter_fields(node)}, **fields}
            ),
            node,
        )

    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARED[type(op)]:
                yield like(ops=[other()])
        case ast.BinOp(op=op) if type(op) in COMPUTED:
            yield like(op=COMPUTED[type(op)]())
        case ast.AugAssign(op=op) if type(op) in COMPUTED:
            yield like(op=COMPUTED[type(op)]())
            yield ast.copy_location(ast.Pass(), node)
        case ast.BoolOp(op=op):
            yield like(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.Invert() | ast.USub(), operand=operand):
            yield deepcopy(operand)
        case ast.Constant(value=bool(value)):
            yield like(value=not value)
        case ast.Constant(value=int(value)):
            yield like(value=value + 1)
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(
            test, ast.Compare
        ):
            yield like(test=ast.UnaryOp(op=ast.Not(), operand=deepcopy(test)))
        case ast.Continue():
            yield ast.copy_location(ast.Break(), node)
        case ast.Break():
            yield ast.copy_location(ast.Continue(), node)
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield ast.copy_location(ast.Pass(), node)
