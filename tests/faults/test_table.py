"""The table of faults is complete, and every test it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def test_fifty_faults_each_with_a_test_that_exists() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (HERE / "README.md").read_text(), re.M)
    functions: dict[str, set[str]] = {}

    assert [int(number) for number, _ in rows] == list(range(1, 51))
    for number, row in rows:
        _, source, caught = row.rsplit(" | ", 2)
        assert re.search(r"\w+/[\w.-]+#\d+|measured", source), number
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", caught)
        assert named, f"fault {number} has no test"
        for path, function in named:
            if path not in functions:
                tree = ast.parse((ROOT / path).read_text())
                functions[path] = {
                    node.name
                    for node in tree.body
                    if isinstance(node, ast.FunctionDef)
                    and node.name.startswith("test_")
                }
            assert function in functions[path], f"fault {number}: {path}::{function}"
