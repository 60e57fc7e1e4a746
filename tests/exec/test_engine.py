"""Autograd's engine, called directly and by way of torch.autograd."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import against_reference, grads, mlp, same
from torch.nn import functional

from pipeproof.exec import Pipeline, engine
from pipeproof.sched import catalog

mse = functional.mse_loss


def put(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Another engine in the place of autograd's."""
    other = SimpleNamespace(run_backward=run)
    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", other)
    engine.entry.cache_clear()


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engine.entry.cache_clear()
    yield
    monkeypatch.undo()
    engine.entry.cache_clear()


def test_this_torch_has_an_entry() -> None:
    assert engine.entry() == torch.autograd.Variable._execution_engine.run_backward


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-v"])
def test_without_an_entry_all_is_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = catalog.make(name, devices=2, micro_batches=4)
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    stages, twin = mlp(plan.stages), mlp(plan.stages)
    for theirs, ours in zip(twin, stages):
        theirs.load_state_dict(ours.state_dict())
    Pipeline(stages, plan, mse).step(x, y)

    monkeypatch.setattr(engine, "entry", lambda: None)
    against_reference(twin, plan, x, y)

    assert same(grads(stages), grads(twin))


@pytest.mark.parametrize("run", [None, lambda *_, **__: (torch.ones(2),)])
def test_an_entry_that_does_something_else_is_not_used(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, run)

    assert engine.entry() is None
