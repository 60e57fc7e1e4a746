"""Mutation testing of what judges schedules and programs: would the tests notice?

One operator, number, condition or statement of a module is changed at a time, in a
sample of all places, and the module's tests run on it in a process of their own. A
mutant is killed if a test fails, or if they take longer than the limit. Annotations
and what only words a message are left alone.

    python experiments/mutation_testing.py
        writes experiments/results/mutation_testing.md
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "experiments" / "results" / "mutation_testing.md"

OF_PROGRAMS = [
    "tests/sched/test_prove.py",
    "tests/sched/interop/test_torch_program.py",
    *("-k", "not catalogue"),  # long, and what it finds the others do
]
TARGETS: dict[str, list[str]] = {
    "check": ["tests/sched/test_check.py"],
    "deadlock": [*OF_PROGRAMS, "tests/sched/test_deadlock.py"],
    "matching": [*OF_PROGRAMS, "tests/sched/test_deadlock.py"],
    "prove": OF_PROGRAMS,
    "legal": OF_PROGRAMS,
    "races": OF_PROGRAMS,
    "walk": OF_PROGRAMS,
}
"""Module of `pipeproof.sched` → pytest's arguments: the tests that are to notice."""

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


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, what was changed, the module) for every place and change."""
    for path, node in _places(tree, ()):
        for changed in _changes(node):
            copy = deepcopy(tree)
            holder: Any = copy
            for step in path[:-1]:
                holder = (
                    holder[step] if isinstance(step, int) else getattr(holder, step)
                )
            last = path[-1]
            if isinstance(last, int):
                holder[last] = changed
            else:
                setattr(holder, last, changed)
            ast.fix_missing_locations(copy)
            before, after = ast.unparse(node), ast.unparse(changed)
            yield node.lineno, f"{before} → {after}", copy


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


class Mutated(MetaPathFinder, Loader):
    """Has one module be another one."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self._name, self._path, self._tree = name, path, tree

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> ModuleSpec | None:
        """Of the one module."""
        if fullname != self._name:
            return None
        return spec_from_loader(fullname, self, origin=str(self._path))

    def exec_module(self, module: ModuleType) -> None:
        """Run what it is now."""
        module.__file__ = str(self._path)
        exec(compile(self._tree, str(self._path), "exec"), module.__dict__)


def fate(module: str, tree: ast.Module, tests: list[str], limit_s: float) -> str:
    """Whether the tests notice, in a process forked off this one.

    Returns:
        `lives`, `killed`, or `late` where they took longer than the limit.
    """
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        name = f"pipeproof.sched.{module}"
        sys.meta_path.insert(0, Mutated(name, ROOT / f"sched/{module}.py", tree))
        import pytest

        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(0 if status == 0 else 1)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return "killed" if status else "lives"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def fate_of(module: str, number: int | None, limit_s: float) -> tuple[str, str]:
    """(what is changed, its fate) of a module's mutant; None: nothing is."""
    tree = ast.parse((ROOT / f"sched/{module}.py").read_text())
    what = "nothing"
    if number is not None:
        line, change, tree = next(islice(mutants(tree), number, None))
        what = f"line {line}: `{change}`"
    return what, fate(module, tree, TARGETS[module], limit_s)


def main() -> None:
    """Sample, run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=10, help="of each module")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each")
    parser.add_argument("--only", action="append", help="these modules")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    import numba  # noqa: F401  (before forking: each child has it then)

    dice = random.Random(arguments.seed)
    modules = arguments.only or list(TARGETS)
    every = {
        module: len(list(mutants(ast.parse((ROOT / f"sched/{module}.py").read_text()))))
        for module in modules
    }
    tasks: list[tuple[str, int | None]] = [(module, None) for module in modules]
    for _ in range(arguments.sample):
        tasks += [(module, dice.randrange(every[module])) for module in modules]
    fates: dict[str, list[tuple[str, str]]] = {module: [] for module in modules}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        found = {
            pool.submit(fate_of, module, number, arguments.limit): (module, number)
            for module, number in dict.fromkeys(tasks)
        }
        for future in as_completed(found):
            module, number = found[future]
            what, fate = future.result()
            print(module, what, fate, flush=True)
            if number is not None:
                fates[module].append((what, fate))
            elif fate != "lives":
                raise SystemExit(f"{module}: its tests, without a change: {fate}")
    arguments.output.write_text("\n".join(report(fates, every, arguments)) + "\n")


def report(
    fates: dict[str, list[tuple[str, str]]],
    every: dict[str, int],
    arguments: argparse.Namespace,
) -> list[str]:
    """The table, as lines of Markdown."""
    ends = [fate for several in fates.values() for _, fate in several]
    late, dead = ends.count("late"), len(ends) - ends.count("lives")
    survivors = [
        f"* `{module}.py`, {what}"
        for module, several in fates.items()
        for what, fate in several
        if fate == "lives"
    ]
    rows = [
        f"| {module} | {every[module]} | {len(several)} | "
        f"{sum(fate != 'lives' for _, fate in several)} |"
        for module, several in fates.items()
    ]
    return [
        "# Mutation testing of check, deadlock and prove",
        "",
        f"{dead} of {len(ends)} sampled mutants are killed ({dead / len(ends):.0%}). A "
        "mutant is one changed operator, number, condition or statement; a sample with "
        f"seed {arguments.seed}. Of the killed, {late} took the tests longer than "
        f"{arguments.limit:.0f} s; without a change all tests pass within that.",
        "",
        "| module | places and changes | sampled | killed |",
        "|-|-|-|-|",
        *rows,
        "",
        *(["## Survivors", "", *survivors, ""] if survivors else []),
        f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with "
        "`python experiments/mutation_testing.py`.",
    ]


if __name__ == "__main__":
    main()
