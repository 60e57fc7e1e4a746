"""What ranks tell each other before a step: mostly what they told before the last."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pipeproof.exec import BatchError
from pipeproof.exec.batch import Batch
from pipeproof.exec.grid import Grid
from pipeproof.exec.opening import Line, Opening
from pipeproof.exec.stage import Stage
from pipeproof.sched import catalog

CPU = torch.device("cpu")
SCHEDULE = catalog.make("1f1b", devices=2, micro_batches=2)


def opening(module: torch.nn.Module | None = None) -> Opening:
    """Of rank 0 of two, which runs this."""
    company: Any = None  # with which it does not talk
    grid = Grid(company, ((0, 1),), 0, 0)
    stage = Stage(0, module or torch.nn.Linear(2, 2), 0, CPU)
    return Opening(grid, SCHEDULE, [stage], CPU)


def lines(rows: int = 6, weight: float = 6.0, signature: str = "as ever") -> list[str]:
    """Of both ranks: the first has the inputs, the last the targets."""
    size = [rows, 1]
    said = [
        Line({"inputs": size}, None, [], [], False, "first"),
        Line({"targets": [6, 1]}, weight, [], [], False, signature),
    ]
    return [json.dumps(line) for line in said]


def test_forms_are_known_when_all_say_what_they_said_before() -> None:
    one = opening()

    assert [one.heard(lines()), one.heard(lines())] == [False, True]
    assert (one.size, one.weight) == ((6, 1), 6.0)
    assert [one.heard(lines(weight=4.0)), one.weight] == [True, 4.0]
    assert not one.heard(lines(signature="other shapes"))
    assert not one.heard(lines())
    assert one.heard(lines())


def test_what_is_refused_is_refused_again() -> None:
    one = opening()

    one.heard(lines())
    for _ in range(2):
        with pytest.raises(BatchError, match="rank 1 have 6 rows, and the inputs 5"):
            one.heard(lines(rows=5))


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": torch.ones(6, 3)},
        {"inputs": torch.ones(6, 2, dtype=torch.float64)},
        {"inputs": torch.ones(6, 2, requires_grad=True)},
        {"inputs": (torch.ones(6, 2), 1)},
        {"keywords": {"mask": torch.ones(6)}},
    ],
)
def test_another_batch_has_another_signature(change: dict[str, Any]) -> None:
    one = opening()
    given: dict[str, Any] = {"inputs": torch.ones(6, 2), "targets": None}

    def signature(**batch: Any) -> str:
        line = one.line("step", Batch(**batch), {"inputs": [6, 1]}, None, frozenset())
        return Line(*json.loads(line)).signature

    first = signature(**given)
    assert signature(**given | {"inputs": torch.zeros(6, 2)}) == first
    assert signature(**given | change) != first
    assert signature(**given) == first


@pytest.mark.parametrize("what", ["training", "requires_grad"])
def test_so_has_a_model_in_another_mode(what: str) -> None:
    linear = torch.nn.Linear(2, 2)
    one, batch = opening(linear), Batch(torch.ones(6, 2), None)

    def line() -> str:
        return one.line("step", batch, {"inputs": [6, 1]}, None, frozenset())

    first = line()
    setattr(linear if what == "training" else linear.weight, what, False)
    assert line() != first
