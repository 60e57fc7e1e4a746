"""The guide's new schedule is one file, one row, and no other change."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_contract as contract
from click.testing import CliRunner

from pipeproof.cli.app import main
from pipeproof.sched import CATALOG, catalog, lower
from pipeproof.sched.row import Case, Row

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Row:
    """The example's row, in the catalogue for the time of a test."""
    (file,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (diff,) = re.findall(r"```diff\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    module = ModuleType("pipeproof.sched.gen.ahead")
    exec(compile(file, "ahead.py", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line, entry = (added.removeprefix("+") for added in diff.splitlines())
    text = Path(str(catalog.__file__)).read_text()
    for place, new in (("from pipeproof.sched.gen.", line), ("        NAIVE,", entry)):
        text = text.replace(place, f"{new}\n{place}", 1)
    changed: dict[str, Any] = {"__name__": catalog.__name__}
    exec(compile(text, "catalog.py", "exec"), changed)
    (name,) = changed["CATALOG"].keys() - CATALOG.keys()
    monkeypatch.setitem(CATALOG, name, changed["CATALOG"][name])
    return CATALOG[name]


def test_keeps_what_all_rows_keep(row: Row) -> None:
    for p, m in contract.SIZES:
        contract.keeps_its_formulas(row, Case(p, m))
        contract.keeps_its_formulas(row, Case(p, m, {}, 3, 2, 5))
    for policy in contract.POLICIES:
        contract.keeps_its_promises(lower(row.generator(3, 7), **policy))
    contract.test_docstring_draws_what_is_simulated(row)
    contract.test_docstring_has_its_parts_in_order(row)


def test_commands_know_it(row: Row) -> None:
    run = CliRunner().invoke
    listed = run(main, ["list"])
    shown = run(main, ["show", row.name, "-p", "2", "-m", "3", "--backward", "1"])
    swept = run(main, ["sweep", row.name, "-p", "2,4", "-m", "8"])

    assert row.name in listed.output
    assert "device 1 | .. F0 F1 B0 F2 B1 B2 .." in shown.output
    assert (swept.exit_code, swept.output.count(row.name)) == (0, 2)
