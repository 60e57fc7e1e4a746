"""Losses without targets: of the output alone, or the output itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import close, grads, mlp, same
from pool import Do
from targetless import Targetless, square, trained_alone, trained_on_ranks
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import BatchError, LossError, Pipeline, reference
from pipeproof.exec.losses import Loss
from pipeproof.sched import catalog, recompute

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = catalog.make("1f1b", devices=2, micro_batches=3)
mse = functional.mse_loss


def optional(output: Tensor, targets: Tensor | None = None) -> Tensor:
    return output.square().mean() if targets is None else mse(output, targets)


class Ends(nn.Module):
    """A last stage that computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return square(self.linear(x))


def to_one(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean()


@pytest.mark.parametrize(
    "loss_fn", [square, optional, partial(to_one, targets=1), None]
)
def test_a_loss_without_targets(loss_fn: Callable[..., Tensor] | None) -> None:
    stages = [*mlp(1), Ends() if loss_fn is None else mlp(1)[0]]
    twins, whole = copy.deepcopy(stages), copy.deepcopy(stages)
    x = torch.randn(7, 4, dtype=torch.float64)  # 3 + 2 + 2

    pipeline = Pipeline(stages, SCHEDULE, loss_fn)
    loss = pipeline.step(x)

    assert torch.equal(loss, reference(twins, SCHEDULE, loss_fn, x))
    assert same(grads(stages), grads(twins))
    torch.testing.assert_close(pipeline.evaluate(x), loss)
    output = whole[1](whole[0](x))
    at_once = output if loss_fn is None else loss_fn(output)
    at_once.backward()
    torch.testing.assert_close(loss, at_once.detach(), rtol=1e-12, atol=0)
    assert close(grads(stages), grads(whole))


def test_one_that_may_take_targets_gets_them() -> None:
    stages = mlp(2)
    twins = copy.deepcopy(stages)
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)

    loss = Pipeline(stages, SCHEDULE, optional).step(x, y)

    assert torch.equal(loss, reference(twins, SCHEDULE, mse, x, y))


class Weighed(nn.Module):
    """A loss that learns."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(4, dtype=torch.float64))
        self.model = model

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        found = (mse(output, targets, reduction="none") * self.weights).mean()
        for p in [] if self.model is None else self.model.parameters():
            found = found + p.square().sum()
        return found


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "chimera"])
@pytest.mark.parametrize("regularised", [False, True])
def test_a_loss_that_learns(regularised: bool, name: str) -> None:
    """By itself, and of the model; batch norms of the model stay their stages' own."""
    made = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double() for _ in "ab"]
    if name == "chimera":
        made = mlp(2)
    ours, theirs = nn.Sequential(*made), copy.deepcopy(nn.Sequential(*made))
    losses = [Weighed(model if regularised else None) for model in (ours, theirs)]
    losses[1].weights.data.copy_(losses[0].weights)
    plan = recompute(catalog.make(name, devices=2, micro_batches=4), "always")
    pipeline = Pipeline([*ours], plan, losses[0])
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    pipeline.step(x, y)
    for part, labels in zip(x.tensor_split(4), y.tensor_split(4)):
        (losses[1](theirs(part), labels) * (len(part) / 9)).backward()

    whole = [*theirs.parameters(), losses[1].weights]
    norm = nn.utils.clip_grad_norm_(whole, 1e-2)
    assert pipeline.clip_grad_norm_(1e-2) == pytest.approx(norm.item(), rel=1e-12)
    found = [p.grad for p in (*ours.parameters(), losses[0].weights)]
    assert close(found, [p.grad for p in whole])


def test_slices_count_with_their_positions() -> None:
    plan = catalog.make("terapipe", devices=2, micro_batches=2, slices=2)
    stages = mlp(2)
    twins = copy.deepcopy(stages)
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    loss = Pipeline(stages, plan, square).step(x)

    whole = square(twins[1](twins[0](x)))
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    assert close(grads(stages), grads(twins))


@pytest.mark.parametrize(
    ("function", "takes", "needs"),
    [
        (mse, True, True),
        (nn.MSELoss(), True, True),
        (square, False, False),
        (optional, True, False),
        (lambda *both: both[0].mean(), True, False),
        (torch.mean, True, True),  # a builtin that does not say
        (None, False, False),
    ],
)
def test_what_a_function_takes(function: Any, takes: bool, needs: bool) -> None:
    found = Loss.of(function)

    assert (found.takes_targets, found.needs_targets) == (takes, needs)


def test_refuses_targets_that_are_too_many_or_missing() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)

    with pytest.raises(BatchError, match="got no targets, which loss_fn takes"):
        Pipeline(mlp(2), SCHEDULE, mse).step(x)
    with pytest.raises(BatchError, match="the loss is made of the output alone"):
        Pipeline(mlp(2), SCHEDULE, square).step(x, x)
    with pytest.raises(LossError, match="loss_scale is a callable of targets, and"):
        Pipeline(mlp(2), SCHEDULE, square, loss_scale=len).step(x)


@pytest.mark.parametrize(
    "job",
    [
        Targetless("1f1b", 4, (9,)),
        Targetless("zb-v", 4, (9,)),
        Targetless("chimera", 4, (9,)),
        Targetless("terapipe", 4, (9,)),
        Targetless("1f1b", 2, (9, 6)),
        Targetless("1f1b", 4, (9,), scale="sum"),
    ],
    ids=lambda job: f"{job.name} {job.rows} {job.scale}",
)
def test_on_ranks(job: Targetless, do: Do) -> None:
    """Only the first rank knows how many rows there are."""
    expected = trained_alone(job)

    for loss, found in do(trained_on_ranks, job):
        assert loss == pytest.approx(expected[0], rel=1e-12)
        assert found == {stage: expected[1][stage] for stage in found}
