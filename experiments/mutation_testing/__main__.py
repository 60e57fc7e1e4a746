"""Mutation testing of what judges schedules and programs: would the tests notice?

One operator, number, condition or statement of a module is changed at a time, in a
sample of all places, and the module's tests run on it in a process of their own until
the first one fails. A mutant is killed if one does, or if they take longer than the
limit. Loops that numba would compile run as plain Python, so that a mutant never
meets what was compiled of another.

    python experiments/mutation_testing
        writes experiments/results/mutation_testing.md
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from equivalent import EQUIVALENT
from mutate import mutants, put

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "experiments" / "results" / "mutation_testing.md"

IN_WORDS = ["tests/cli/test_proving.py"]
OF_ENDS = ["tests/sched/test_ties.py", "tests/sched/test_steps.py"]
OF_CHECK = ["tests/sched/test_check.py", "tests/sched/test_reduce.py", *OF_ENDS]
OF_DEADLOCKS = ["tests/sched/test_deadlock.py", "tests/sched/test_groups.py"]
OF_PROOFS = ["tests/sched/test_prove.py", "tests/sched/interop/test_torch_program.py"]
OF_PROGRAMS = [*OF_DEADLOCKS, *OF_PROOFS]
OF_LOWERING = ["tests/sched/test_program.py", *OF_PROGRAMS, "tests/sim/test_offload.py"]
TARGETS: dict[str, list[str]] = {
    "check": [*OF_CHECK, *OF_DEADLOCKS],
    "deadlock": OF_PROGRAMS,
    "prove": [*OF_PROOFS, *OF_DEADLOCKS, *OF_ENDS],
    "tied": [*OF_ENDS, *OF_PROOFS],
    "clean": [*OF_CHECK, *OF_DEADLOCKS],
    "ties": [*OF_ENDS, *OF_PROOFS],
    "tying": [*OF_ENDS, *OF_PROOFS],
    "findings": [*OF_CHECK, *OF_PROGRAMS, *IN_WORDS],
    "matching": OF_PROGRAMS,
    "groups": [*OF_PROGRAMS, "tests/sim/test_groups.py"],
    "streams": [*OF_PROGRAMS, "tests/sim/test_sharing.py"],
    "cycles": OF_PROGRAMS,
    "kernels": ["tests/sched/test_kernels.py", *OF_PROGRAMS],
    "legal": [*OF_PROOFS, *OF_DEADLOCKS],
    "races": [*OF_PROOFS, *OF_DEADLOCKS],
    "walk": [*OF_PROOFS, *OF_DEADLOCKS, *OF_ENDS],
    "terms": [*OF_PROOFS, *OF_DEADLOCKS, *OF_ENDS],
    "history": [*OF_PROOFS, *OF_DEADLOCKS],
    "certificate": [*OF_PROOFS, *OF_DEADLOCKS, *IN_WORDS],
    "conditions": OF_LOWERING,
    "touches": OF_LOWERING,
}
"""Module of `pipeproof.sched` → the tests that are to notice, likely ones first."""

JUDGES = ("check", "deadlock", "prove", "tied")
"""The modules that the figure is about, `tied` a part of prove; the others are what
they rest on."""

MEMORY = 6 << 30
"""Bytes that a test process may take."""

Lines = list[str]

LOADED_FIRST = (
    *("hypothesis.strategies", "_hypothesis_pytestplugin", "networkx", "numpy"),
    *("pytest", "simpy", "torch"),
)
"""What a test process need not load again; nothing of ours, nor numba."""

REWRITES = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
"""As hypothesis is loaded, its assertions are not rewritten; ours are."""


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


class FirstFailure:
    """Tells pytest that any failing example will do, and what to try last."""

    def pytest_sessionstart(self) -> None:
        """No time is spent on finding a smaller example."""
        from hypothesis import Phase, settings

        settings.register_profile(
            "first failure",
            settings.get_profile("pipeproof"),
            phases=[Phase.explicit, Phase.generate],
        )
        settings.load_profile("first failure")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Pictures first, laws on random examples then, the whole catalogue last."""
        items.sort(
            key=lambda item: (
                "catalogue" in item.name,
                hasattr(item.obj, "hypothesis"),
            )
        )


def fate(module: str, tree: ast.Module, tests: list[str], limit_s: float) -> str:
    """Whether the tests notice, in a process forked off this one.

    Returns:
        `lives`, `killed`, or `late` where they took longer than the limit.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            status = _tested(module, tree, tests)
        finally:  # never on into what the parent does
            os._exit(status)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return "killed" if status else "lives"
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _tested(module: str, tree: ast.Module, tests: list[str]) -> int:
    """Run the tests on a module in this process; 0 if all pass."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    name = f"pipeproof.sched.{module}"
    sys.meta_path.insert(0, Mutated(name, ROOT / f"sched/{module}.py", tree))
    import pytest

    quick = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    return int(pytest.main([*quick, *REWRITES, *tests], plugins=[FirstFailure()]) != 0)


Found = tuple[int, str, str]
"""The line of a mutant, what is changed, and its fate."""


def fate_of(module: str, number: int | None, limit_s: float) -> Found:
    """Of a module's mutant; None: of the module as it is."""
    tree = ast.parse((ROOT / f"sched/{module}.py").read_text())
    line, change = 0, "nothing"
    if number is not None:
        line, change, path, node = next(islice(mutants(tree), number, None))
        put(tree, path, node)
    return line, change, fate(module, tree, TARGETS[module], limit_s)


def main() -> None:
    """Sample, run, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=36, help="of each judge")
    parser.add_argument("--of-others", type=int, default=2, help="of each other module")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each")
    parser.add_argument("--only", action="append", help="these modules")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.modules["numba"] = None  # type: ignore[assignment]  # as if there were none
    for name in LOADED_FIRST:
        import_module(name)
    dice = random.Random(arguments.seed)
    modules = arguments.only or list(TARGETS)
    every = {
        module: len(list(mutants(ast.parse((ROOT / f"sched/{module}.py").read_text()))))
        for module in modules
    }
    unchanged = {tuple(TARGETS[module]): module for module in modules}
    tasks: list[tuple[str, int | None]] = [(one, None) for one in unchanged.values()]
    for module in modules:
        size = arguments.sample if module in JUDGES else arguments.of_others
        chosen = dice.sample(range(every[module]), min(size, every[module]))
        tasks += [(module, number) for number in chosen]
    fates: dict[str, list[Found]] = {module: [] for module in modules}
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.jobs, mp_context=forked) as pool:
        running = {
            pool.submit(fate_of, module, number, arguments.limit): (module, number)
            for module, number in tasks
        }
        for future in as_completed(running):
            module, number = running[future]
            found = future.result()
            print(module, number, *found, file=sys.stderr, flush=True)
            if number is not None:
                fates[module].append(found)
            elif found[-1] != "lives":
                raise SystemExit(f"{module}: its tests, without a change: {found[-1]}")
    arguments.output.write_text("\n".join(report(fates, every, arguments)) + "\n")


Fates = dict[str, list[Found]]


def text_at(module: str, line: int) -> str:
    """A line of a module."""
    return (ROOT / f"sched/{module}.py").read_text().splitlines()[line - 1].strip()


def why_alive(module: str, line: int, change: str) -> str | None:
    """Why a mutant is no other program, if that is argued."""
    return EQUIVALENT.get((module, text_at(module, line), change))


def counted(fates: Fates, modules: tuple[str, ...]) -> str:
    """Killed of all, and of those that are not argued to be equivalent."""
    killed, equivalent, total = 0, 0, 0
    for module in modules:
        for line, change, fate in fates.get(module, []):
            total += 1
            killed += fate != "lives"
            equivalent += fate == "lives" and bool(why_alive(module, line, change))
    inequivalent = total - equivalent
    return (
        f"{killed} of {total} ({killed / max(1, total):.0%}), or of the "
        f"{inequivalent} that are not argued to be equivalent "
        f"{killed / max(1, inequivalent):.0%}"
    )


def report(fates: Fates, every: dict[str, int], arguments: argparse.Namespace) -> Lines:
    """The table, as lines of Markdown."""
    ends = Counter(fate for several in fates.values() for _, _, fate in several)
    alive = [
        (
            f"* `{module}.py`, line {line}, `{text_at(module, line)}`: `{change}`",
            why_alive(module, line, change),
        )
        for module, several in fates.items()
        for line, change, fate in sorted(several)
        if fate == "lives"
    ]
    equivalent = [f"{what}; {why}" for what, why in alive if why]
    others = [what for what, why in alive if not why]
    rows = [
        f"| {module} | {every[module]} | {len(several)} | "
        f"{sum(fate != 'lives' for *_, fate in several)} |"
        for module, several in fates.items()
    ]
    rest = tuple(module for module in fates if module not in JUDGES)
    return [
        "# Mutation testing of check, deadlock and prove",
        "",
        f"Killed are, of {', '.join(JUDGES)}, {counted(fates, JUDGES)}; of what they "
        f"rest on, {counted(fates, rest)}.",
        "",
        "A mutant is one changed operator, number, condition or statement; a sample "
        f"with seed {arguments.seed}. Of the killed, {ends['late']} took the tests "
        f"longer than {arguments.limit:.0f} s; without a change all tests pass within "
        "that.",
        "",
        "| module | places and changes | sampled | killed |",
        "|-|-|-|-|",
        *rows,
        "",
        *(["## Survivors", "", *others, ""] if others else []),
        *(
            ["## Survivors that change nothing", "", *equivalent, ""]
            if equivalent
            else []
        ),
        f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with "
        "`python experiments/mutation_testing`.",
    ]


if __name__ == "__main__":
    main()
