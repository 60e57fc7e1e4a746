"""What each micro-batch's loss counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import against_reference, close, grads, mlp
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import LossError, Pipeline
from pipeproof.sched import Certificate, ParameterError, catalog, prove

SCHEDULE = catalog.make("1f1b", devices=2, micro_batches=3)


def batch(rows: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, rows, 4, dtype=torch.float64)
    return x, y


def test_uneven_micro_batches_count_with_their_rows() -> None:
    stages = mlp(2)
    twin = copy.deepcopy(stages)
    x, y = batch(7)  # 3 + 2 + 2

    loss = Pipeline(stages, SCHEDULE, functional.mse_loss).step(x, y)

    whole = functional.mse_loss(twin[1](twin[0](x)), y)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    assert close(grads(stages), grads(twin))


def test_a_sum_adds_up_without_division() -> None:
    def total(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output, target, reduction="sum")

    stages = mlp(2)
    twin = copy.deepcopy(stages)
    x, y = batch(7)

    Pipeline(stages, SCHEDULE, total, loss_scale="sum").step(x, y)

    total(twin[1](twin[0](x)), y).backward()
    assert close(grads(stages), grads(twin))


def test_a_callable_weighs_by_the_tokens_that_count() -> None:
    """Means of micro-batch means over-weight short sequences (fault 7)."""
    torch.manual_seed(2)
    stages = [nn.Linear(4, 5, dtype=torch.float64), nn.Linear(5, 6).double()]
    twin = copy.deepcopy(stages)
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, -100, -100, -100, 3, 5])

    def tokens(target: Tensor) -> Tensor:
        return (target != -100).sum()

    against_reference(
        stages, SCHEDULE, x, y, functional.cross_entropy, loss_scale=tokens
    )

    functional.cross_entropy(twin[1](twin[0](x)), y).backward()
    assert close(
        [p.grad for p in nn.ModuleList(stages).parameters()],
        [p.grad for p in nn.ModuleList(twin).parameters()],
    )


def total_error(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target, reduction="sum")


def above_zero(target: Tensor) -> Tensor:
    return (target > 0).sum()


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(
    ("scale", "loss_fn"),
    [
        ("rows", functional.mse_loss),
        ("sum", total_error),
        (above_zero, functional.mse_loss),
    ],
)
def test_each_term_of_the_certificate_has_its_weight_once(
    scale: Any, loss_fn: Any, slices: int
) -> None:
    """Of uneven micro-batches and slices, bit by bit, in the order that it states."""
    schedule = SCHEDULE
    if slices > 1:
        schedule = catalog.make("seq1f1b", devices=2, micro_batches=3, slices=slices)
    torch.manual_seed(3)
    x, y = torch.randn(2, 7, 5, 4, dtype=torch.float64)
    stages = mlp(2)
    twin = copy.deepcopy(nn.Sequential(*stages))
    certificate = prove(schedule)
    assert isinstance(certificate, Certificate)

    Pipeline(stages, schedule, loss_fn, loss_scale=scale).step(x, y)

    def parts(whole: Tensor) -> dict[tuple[int, int], Tensor]:
        return {
            (m, q): part
            for m, of_m in enumerate(whole.tensor_split(3))
            for q, part in enumerate(of_m.tensor_split(slices, 1))
        }

    weight = {
        "rows": lambda target: float(target.shape[0] * target.shape[1]),
        "sum": lambda target: None,
    }.get(scale, lambda target: float(above_zero(target)))
    weights = {of: weight(part) for of, part in parts(y).items()}
    for stage, (chain,) in enumerate(certificate.trees):
        wanted = [torch.zeros(0)] * 2
        for n, of in enumerate(chain.terms):
            loss = loss_fn(twin(parts(x)[of]), parts(y)[of])
            if weights[of] is not None:
                loss = loss * (weights[of] / sum(weights.values()))
            terms = torch.autograd.grad(loss, list(twin[stage].parameters()))
            wanted = [a + b if n else b for a, b in zip(wanted, terms)]
        found = [p.grad for p in stages[stage].parameters()]
        assert all(map(torch.equal, found, wanted)), f"stage {stage}"


def test_gradients_do_not_depend_on_the_number_of_micro_batches() -> None:
    x, y = batch(12)
    found = []
    for count in (1, 2, 3, 5, 12):
        stages = mlp(2)
        schedule = catalog.make("gpipe", devices=2, micro_batches=count)
        Pipeline(stages, schedule, functional.mse_loss).step(x, y)
        found.append(grads(stages))

    assert all(close(found[0], other) for other in found[1:])


def test_each_output_meets_its_own_labels() -> None:
    """Labels are micro-batch numbers; an output with another's label shows."""
    seen: list[tuple[int, int]] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append((int(output.detach().mean().round()), int(target[0])))
        return output.mean()

    stages = [nn.Identity(), nn.Linear(1, 1, dtype=torch.float64)]
    with torch.no_grad():
        stages[1].weight.fill_(1.0)
        stages[1].bias.zero_()
    x = torch.arange(5, dtype=torch.float64).reshape(5, 1)
    schedule = catalog.make("gpipe", devices=2, micro_batches=5)
    Pipeline(stages, schedule, loss).step(x, torch.arange(5))

    assert sorted(seen) == [(i, i) for i in range(5)]


def test_the_loss_is_detached_and_nothing_of_the_graph_stays() -> None:
    stages = mlp(2)

    loss = Pipeline(stages, SCHEDULE, functional.mse_loss).step(*batch())

    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, t: o - t, r"must be a floating-point scalar, got shape \(3, 4\)"),
        (lambda o, t: 1.0, "must be a tensor, got float"),
        (lambda o, t: o.sum().long(), r"scalar, got shape \(\) of torch.int64"),
        (lambda o, t: t.sum(), "depends on nothing that requires a gradient"),
    ],
)
def test_what_is_no_loss_is_refused(loss_fn: object, message: str) -> None:
    pipeline = Pipeline(mlp(2), SCHEDULE, loss_fn)
    with pytest.raises(LossError, match=message) as caught:
        pipeline.step(*batch())

    assert "stage 1, micro-batch 0" in str(caught.value)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    pipeline = Pipeline(
        mlp(2), SCHEDULE, functional.mse_loss, loss_scale=lambda _: weight
    )
    with pytest.raises(LossError, match="gave micro-batch 0 the weight"):
        pipeline.step(*batch())


def test_weights_of_nothing_are_refused() -> None:
    pipeline = Pipeline(mlp(2), SCHEDULE, functional.mse_loss, loss_scale=lambda _: 0)
    with pytest.raises(LossError, match="every micro-batch the weight 0"):
        pipeline.step(*batch())


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ParameterError, match="must be 'rows', 'sum' or a callable"):
        Pipeline(mlp(2), SCHEDULE, functional.mse_loss, loss_scale="mean")
