"""Who imports whom, and that every public name is there."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("sched", "sim", "exec", "cli")
FORBIDDEN = {
    "sched": {"torch", "simpy", "pipeproof.sim", "pipeproof.exec", "pipeproof.cli"},
    "sim": {"torch", "pipeproof.exec", "pipeproof.cli"},
    "exec": {"simpy", "pipeproof.sim", "pipeproof.cli"},
    "cli": set[str](),
}
BARE = {"sim", "exec", "cli", "sched"}
"""Never imported without `pipeproof.`: `sched` is the standard library's."""


def files(package: str) -> Iterator[Path]:
    module = importlib.import_module(f"pipeproof.{package}")
    assert module.__file__ is not None
    yield from Path(module.__file__).parent.rglob("*.py")


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports relative to the package"
            assert node.module is not None
            names |= {node.module}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in files(package):
        for name in imported(path):
            parts = name.split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert not prefixes & FORBIDDEN[package], f"{path} imports {name}"
            assert parts[0] not in BARE, f"{path} imports {name} by its bare name"


@pytest.mark.parametrize("package", [*PACKAGES, "sched.gen", "sched.interop"])
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(f"pipeproof.{package}")
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.asname is not None:
                    assert alias.asname == alias.name
                    assert hasattr(module, alias.name)
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name)


def run(code: str) -> str:
    """What a fresh process prints, with nothing of ours first on its path."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_simulating_imports_no_torch() -> None:
    code = (
        "import sys, pipeproof.sched, pipeproof.sim as sim\n"
        "s = pipeproof.sched.catalog.make('1f1b', devices=2, micro_batches=2)\n"
        "sim.simulate(s)\n"
        "heavy = {'torch', 'pipeproof.exec', 'numba', 'networkx', 'joblib'}\n"
        "print(heavy & set(sys.modules))"
    )

    assert run(code) == "set()"


def test_a_schedule_needs_no_simulator() -> None:
    code = (
        "import sys, pipeproof.sched as p\n"
        "p.lower(p.catalog.make('gpipe', devices=2, micro_batches=2))\n"
        "print({'torch', 'simpy', 'numba', 'networkx'} & set(sys.modules))"
    )

    assert run(code) == "set()"


def test_the_standard_scheduler_is_still_there() -> None:
    assert run("import pipeproof.sched, sched; print(sched.scheduler.__module__)") == (
        "sched"
    )
    assert run("import sched; print(hasattr(sched, 'Schedule'))") == "False"
