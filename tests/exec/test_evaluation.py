"""Evaluation and prediction, losses of micro-batches, and the norm of all gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from evaluating import clipped, evaluated
from jobs import Job
from models import EXECUTED, Masked, close, keywords, mlp, same, small
from pool import Do
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import BatchError, Pipeline, StepError
from pipeproof.sched import Kind, ParameterError, Schedule, catalog, recompute

mse = functional.mse_loss
WIDTH = 4


def schedule(name: str = "1f1b") -> Schedule:
    return catalog.make(name, devices=2, micro_batches=3)


def batch(rows: int = 7) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, rows, WIDTH, dtype=torch.float64)


def chatty(stages: int) -> list[nn.Module]:
    """With dropout and batch norm, which behave otherwise in eval mode."""
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        ).double()
        for _ in range(stages)
    ]


@pytest.mark.parametrize("name", EXECUTED)
def test_every_row_predicts_what_the_model_does(name: str) -> None:
    plan = small(name)
    if not plan.has(Kind.OFFLOAD):
        plan = recompute(plan, "always")
    stages = mlp(plan.stages)
    shape = (11, 6, WIDTH) if plan.slices > 1 else (11, WIDTH)
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    pipeline = Pipeline(stages, plan, mse)
    model = nn.Sequential(*stages).requires_grad_(False)

    assert close([pipeline.predict(x)], [model(x)])
    assert close([pipeline.evaluate(x, y)], [mse(model(x), y)])
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_is_in_eval_mode_and_leaves_every_mode_as_it_was() -> None:
    """`schedule.eval()` was not `module.eval()`, and graphs were built (fault 48)."""
    stages = chatty(2)
    stages[1][1].eval()
    modes = [m.training for stage in stages for m in stage.modules()]
    before = copy.deepcopy([stage.state_dict() for stage in stages])
    x, y = batch()
    pipeline = Pipeline(stages, schedule(), mse)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()

    first, second = pipeline.predict(x), pipeline.predict(x)
    loss = pipeline.evaluate(x, y)

    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not loss.requires_grad
    assert [m.training for stage in stages for m in stage.modules()] == modes
    for stage, was in zip(stages, before):
        assert same(list(stage.state_dict().values()), list(was.values()))
    whole = nn.Sequential(*copy.deepcopy(stages)).eval().requires_grad_(False)
    assert close([first], [whole(x)])
    assert not torch.equal(torch.random.get_rng_state(), state), "one draw, as a step"


def test_each_unit_runs_once_for_each_micro_batch() -> None:
    stages, ran = mlp(2), []
    stages[0].register_forward_hook(lambda *_: ran.append(1))
    plan = recompute(schedule("gpipe"), "always")

    Pipeline(stages, plan, mse).evaluate(*batch())

    assert len(ran) == 3


def test_keywords_and_nested_outputs() -> None:
    class Ends(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"y": (x, x.sum()), "rows": len(x)}

    stages = [Masked(), nn.Sequential(Masked(), Ends())]
    x, _ = batch()
    given = keywords(7)

    found = Pipeline(stages, schedule(), mse).predict(x, keywords=given)

    given |= {"table": given["table"].value}
    y = stages[1][0](stages[0](x, **given), **given)
    assert close([found["y"][0]], [y.detach()])
    assert found["y"][1].shape == (3,)
    assert found["rows"] == [3, 2, 2]


def test_training_goes_on_after_an_evaluation() -> None:
    stages = chatty(2)
    twin = copy.deepcopy(stages)
    x, y = batch()
    ours, theirs = (Pipeline(s, schedule(), mse) for s in (stages, twin))
    ours.evaluate(x, y)
    for pipeline in (ours, theirs):
        torch.manual_seed(2)
        pipeline.step(x, y)

    assert same(
        [p.grad for stage in stages for p in stage.parameters()],
        [p.grad for stage in twin for p in stage.parameters()],
    )


def test_a_forward_that_raises_is_named() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    pipeline = Pipeline([*mlp(1), Fails()], schedule(), mse)
    with pytest.raises(StepError, match=r"broke off at 1F0 .*ValueError: no$"):
        pipeline.predict(batch()[0])
    with pytest.raises(BatchError, match="evaluate needs targets; predict does with"):
        pipeline.evaluate(batch()[0], None)


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved", "chimera"])
def test_ranks_evaluate_as_one_process(name: str, do: Do, one_thread: None) -> None:
    job = Job(name, 4, 4, shapes=((9, 3),))

    found = do(evaluated, job)

    expected = evaluated(False, job)
    for of_rank in found:
        assert of_rank.losses == expected.losses
    if len(job.schedule.placement.pipes) == 1:  # else each has some of them
        assert [x.predicted for x in found if x.predicted] == [expected.predicted]


def test_the_losses_of_micro_batches() -> None:
    """They were overwritten where the backward came later (fault 32)."""
    stages = mlp(2)
    x, y = batch()
    pipeline = Pipeline(stages, schedule("gpipe"), mse)
    with pytest.raises(ParameterError, match="there are no losses yet"):
        _ = pipeline.losses

    loss = pipeline.step(x, y)

    parts = zip(x.tensor_split(3), y.tensor_split(3))
    model = nn.Sequential(*stages).requires_grad_(False)
    expected = [mse(model(a), b) * (len(a) / 7) for a, b in parts]
    assert close(pipeline.losses, expected)
    assert sum(pipeline.losses) == loss
    assert not any(part.requires_grad for part in pipeline.losses)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_the_norm_is_that_of_the_whole_model(norm_type: float, max_norm: float) -> None:
    """It was each stage's own, or counted a tied weight twice (faults 18 and 19)."""
    stages = mlp(3)
    stages[2][0].weight = stages[0][0].weight
    plan = catalog.make("1f1b", devices=3, micro_batches=3)
    pipeline = Pipeline(stages, plan, mse)
    pipeline.step(*batch())
    twin = copy.deepcopy(nn.Sequential(*stages))
    for theirs, ours in zip(twin.parameters(), nn.Sequential(*stages).parameters()):
        theirs.grad = ours.grad.clone()

    found = pipeline.clip_grad_norm_(max_norm, norm_type)

    expected = nn.utils.clip_grad_norm_(twin.parameters(), max_norm, norm_type)
    assert found == pytest.approx(float(expected), rel=1e-12)
    parameters = nn.Sequential(*stages).parameters()
    assert close([p.grad for p in parameters], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("name", ["1f1b", "chimera"])
def test_ranks_clip_as_one_process(name: str, do: Do, one_thread: None) -> None:
    job = Job(name, 4, 4, shapes=((9, 3),))

    found = do(clipped, job)

    expected = clipped(False, job)
    assert {of_rank.norm for of_rank in found} == {expected.norm}
    for of_rank in found:
        for stage, grads in of_rank.grads.items():
            assert grads == expected.grads[stage]


def test_a_norm_that_is_none_is_refused() -> None:
    pipeline = Pipeline(mlp(2), schedule(), mse)
    with pytest.raises(ParameterError, match="max_norm must be above 0, got 0"):
        pipeline.clip_grad_norm_(0)
    with pytest.raises(ParameterError, match="norm_type must be above 0, got nan"):
        pipeline.clip_grad_norm_(1, math.nan)
