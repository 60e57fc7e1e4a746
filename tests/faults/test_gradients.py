"""Wrong gradients that pipeline executors have shipped; see README.md beside this."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeproof.exec import Pipeline, StepError, instructions, runtime
from pipeproof.sched import Schedule, catalog

WIDTH = 4


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def made(name: str = "1f1b", devices: int = 3, micro_batches: int = 4) -> Schedule:
    return catalog.make(name, devices=devices, micro_batches=micro_batches)


def layers(schedule: Schedule) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        for _ in range(schedule.stages)
    ]


def batch(rows: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, rows, WIDTH)
    return x, y


def parameters(stages: list[nn.Module]) -> list[nn.Parameter]:
    """Each once, however many stages hold it."""
    return list(nn.ModuleList(stages).parameters())


def close(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["zb-h1", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("mean", [True, False])
def test_every_stage_of_a_split_backward_is_scaled_once(name: str, mean: bool) -> None:
    """Faults 1, 3 and 4: the scale was missing in W, or each stage scaled again."""
    schedule = made(name, 3, 6)
    stages = layers(schedule)
    twins = copy.deepcopy(stages)
    x, y = batch(13)  # micro-batches of 3 and 2 rows

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output, target, reduction="mean" if mean else "sum")

    scale: Any = "rows" if mean else "sum"
    Pipeline(stages, schedule, loss_fn, loss_scale=scale).step(x, y)
    loss_fn(nn.Sequential(*twins)(x), y).backward()

    close(stages, twins)


def test_steps_of_different_shapes_add_up() -> None:
    """Fault 40: learning the new shape threw the gradients of steps before away."""
    schedule = made()
    stages = layers(schedule)
    twins = copy.deepcopy(stages)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)

    for rows in (8, 5, 11, 8):
        x, y = batch(rows)
        pipeline.step(x, y)
        functional.mse_loss(nn.Sequential(*twins)(x), y).backward()

    close(stages, twins)


def test_the_norm_counts_a_tied_weight_once() -> None:
    """Faults 18 and 19: it was in the norm twice, or each stage clipped by its own."""
    schedule = made()
    stages = layers(schedule)
    stages[2][0].weight = stages[0][0].weight
    twins = copy.deepcopy(stages)
    x, y = batch(8)

    Pipeline(stages, schedule, functional.mse_loss).step(x, y)
    functional.mse_loss(nn.Sequential(*twins)(x), y).backward()
    ours, theirs = (
        nn.utils.clip_grad_norm_(parameters(of), 0.01) for of in (stages, twins)
    )

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    close(stages, twins)


class Again(nn.Module):
    """A layer in a reentrant checkpoint, whose input need not want a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.layer, x, use_reentrant=True)
        return result


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_a_reentrant_checkpoint_at_the_start_is_no_silent_loss(name: str) -> None:
    """Fault 23: its output wants no gradient, and then no stage before it got one.

    Here as without a pipeline: what is behind the checkpoint learns, and only the
    layer in it, which torch warns of, does not.
    """
    schedule = made(name)
    stages = [Again(), *layers(schedule)[1:]]
    twins = copy.deepcopy(stages)
    x, y = batch(8)

    Pipeline(stages, schedule, functional.mse_loss).step(x, y)
    functional.mse_loss(nn.Sequential(*twins)(x), y).backward()

    close(stages[1:], twins[1:])
    assert [p.grad for p in stages[0].parameters()] == [None, None]
    assert [p.grad for p in twins[0].parameters()] == [None, None]


def test_a_loss_that_is_no_number_shows_as_it_does_without_a_pipeline() -> None:
    """Fault 49: NaN of one micro-batch passed silently."""
    schedule = made()
    stages = layers(schedule)
    x, y = batch(8)
    y[5] = float("nan")

    loss = Pipeline(stages, schedule, functional.mse_loss).step(x, y)

    assert loss.isnan()
    assert all(p.grad is not None and p.grad.isnan().all() for p in parameters(stages))


class Bad(nn.Module):
    """A layer that makes NaN of some rows on their way, or of their gradients."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where = nn.Linear(WIDTH, WIDTH), where

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        bad = x[:, :1] > 50
        if self.where == "output":
            return torch.where(bad, torch.nan, y)
        # The gradient of a root is infinite at 0, and infinity times 0 is NaN.
        return y + torch.where(bad, 0.0, 1.0) * (x - x.detach() + (~bad)).sqrt()


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "dualpipe-v", "chimera"])
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("output", "the output is first not finite at 0F2, stage 0, micro-batch 2: "),
        ("backward", "the gradient of .* is first not finite at 0.2, stage 0, micro-b"),
        ("loss", "the loss is first not finite at .F2, stage ., micro-batch 2: 1 NaN"),
    ],
)
def test_what_is_not_finite_is_named_where_it_begins(
    name: str, where: str, words: str
) -> None:
    """Fault 49: NaN says nothing of the stage and the micro-batch that made it."""
    schedule = made(name, 2)
    stages = layers(schedule)
    x, y = batch(8)
    if where == "loss":
        y[5] = torch.nan
    else:
        stages[0] = Bad(where)
        x[5] = 100
    x.requires_grad_()
    pipeline = Pipeline(stages, schedule, functional.mse_loss, check_finite=True)

    with pytest.raises(StepError, match=words):
        pipeline.step(x, y)


def test_a_gradient_of_parameters_alone_is_named() -> None:
    schedule = made("1f1b", 2)
    stages = layers(schedule)
    x, y = batch(8)
    stages[1][0].weight.register_hook(lambda grad: grad * torch.inf)
    pipeline = Pipeline(stages, schedule, functional.mse_loss, check_finite=True)

    words = r"parameter of shape \(4, 4\) is first not finite at 1B0, stage 1"
    with pytest.raises(StepError, match=words):
        pipeline.step(x, y)
    with pytest.raises(StepError, match=r"before the step.* of stage 1 .* zero it"):
        pipeline.step(x, y)
    assert pipeline.evaluate(x, y).isfinite()


def test_nothing_is_looked_at_unless_asked() -> None:
    schedule = made()
    stages = layers(schedule)

    with (
        patch.object(instructions, "looked_at") as looked,
        patch.object(runtime, "check_before") as before,
    ):
        Pipeline(stages, schedule, functional.mse_loss).step(*batch(8))

    assert not looked.called
    assert not before.called


def test_looking_changes_nothing_and_leaves_overflows_to_a_scaler() -> None:
    schedule = made()
    stages = layers(schedule)
    twins = copy.deepcopy(stages)
    x, y = batch(8)
    looking = Pipeline(stages, schedule, functional.mse_loss, check_finite=True)

    loss = looking.step(x, y)

    assert torch.equal(Pipeline(twins, schedule, functional.mse_loss).step(x, y), loss)
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(parameters(stages), parameters(twins), strict=True)
    )
    nn.ModuleList(stages).zero_grad()
    stages[1][0].weight.register_hook(lambda grad: grad * torch.inf)
    looking.step(x, y, scaler=torch.amp.GradScaler("cpu"))
    assert all(p.grad.isinf().all() for p in parameters(stages))


def test_one_overflow_skips_the_step_of_every_stage() -> None:
    """Fault 37: only the stage that overflowed skipped, and the others went on."""
    schedule = made()
    stages = layers(schedule)
    before = [p.detach().clone() for p in parameters(stages)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(parameters(stages), lr=0.1)

    def scaled(output: Tensor, target: Tensor) -> Tensor:
        return scaler.scale(functional.mse_loss(output, target))

    Pipeline(stages, schedule, scaled).step(*batch(8))
    stages[1][0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()

    assert all(torch.equal(p, q) for p, q in zip(parameters(stages), before))
    assert scaler.get_scale() == 2


def test_modes_are_left_as_they_are() -> None:
    """Fault 48: a module was left in training mode, or evaluated in it."""
    schedule = made()
    stages = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)) for _ in range(3)]
    stages[1].eval()
    pipeline = Pipeline(stages, schedule, functional.mse_loss)

    pipeline.step(*batch(8))
    assert [stage.training for stage in stages] == [True, False, True]
    for stage in stages:
        stage.eval()
    x, y = batch(8)
    assert torch.equal(pipeline.step(x, y), pipeline.step(x, y))


def test_what_belongs_to_the_whole_batch_is_no_argument_of_a_row() -> None:
    """Fault 38: positions within the batch were cut as rows, and kept their values.

    A stage that wants rows' lengths gets them as a second input, cut with the rows;
    sums over them are its own business.
    """

    class Weighs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.seen: list[list[int]] = []

        def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
            x, lengths = value
            self.seen.append(lengths.tolist())
            output: Tensor = self.layer(x) / lengths[:, None]
            return output

    schedule = made("gpipe", 1, 3)
    stage = Weighs()
    x, y = batch(8)
    lengths = torch.arange(1, 9)

    Pipeline([stage], schedule, functional.mse_loss).step((x, lengths), y)

    assert stage.seen == [[1, 2, 3], [4, 5, 6], [7, 8]]
