"""Batch norm: per micro-batch, or with the running statistics of the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import against_reference, same
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline, defer_batch_norm
from pipeproof.sched import POLICIES, Schedule, catalog, recompute

mse = functional.mse_loss
WIDTH = 3
NAMES = ("gpipe", "1f1b", "zb-h1", "interleaved", "zb-v")


def schedule(name: str = "1f1b", policy: str = "never") -> Schedule:
    return recompute(catalog.make(name, devices=2, micro_batches=4), policy)


def norm_first(
    momentum: float | None = 0.1, dtype: torch.dtype = torch.float64
) -> list[nn.Module]:
    """The batch itself is normalised, so that its statistics can be told."""
    torch.manual_seed(0)
    return [
        nn.Sequential(
            nn.BatchNorm1d(WIDTH, momentum=momentum), nn.Linear(WIDTH, WIDTH)
        ).to(dtype),
        nn.Linear(WIDTH, WIDTH, dtype=dtype),
    ]


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(8, 19), min_size=1, max_size=3),
    momentum=st.none() | st.floats(0.01, 1),
    mean=st.sampled_from((0.0, 1.0, 1e3)),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 99),
)
def test_running_statistics_are_those_of_one_whole_batch(
    rows: list[int], momentum: float | None, mean: float, policy: str, seed: int
) -> None:
    stages = norm_first(momentum)
    whole = copy.deepcopy(stages[0][0])
    defer_batch_norm(stages[0])
    pipeline = Pipeline(stages, schedule(policy=policy), mse)
    torch.manual_seed(seed)
    for count in rows:
        x = torch.randn(count, WIDTH, dtype=torch.float64) + mean
        pipeline.step(x, torch.zeros_like(x))
        whole(x)

    norm = stages[0][0]
    assert int(norm.num_batches_tracked) == len(rows)
    assert near(norm.running_mean, whole.running_mean, 1e-13)
    assert near(norm.running_var, whole.running_var, 1e-12)


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """As sums of squares, a variance of 1 at 1e8 has no correct digit in float64."""
    stages = norm_first(momentum=1.0)
    defer_batch_norm(stages[0])
    torch.manual_seed(0)
    x = torch.randn(23, WIDTH, dtype=torch.float64)

    x = (x + 1e8) - 1e8  # what is left of it there

    Pipeline(stages, schedule(), mse).step(x + 1e8, x)

    assert near(stages[0][0].running_var, x.var(0), 1e-13)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("deferred", [False, True])
def test_both_kinds_equal_the_reference(name: str, policy: str, deferred: bool) -> None:
    """Recomputation counted micro-batches twice (torchgpipe 14, fault 20)."""
    plan = schedule(name, policy)
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        for _ in range(plan.stages)
    ]
    if deferred:
        for stage in stages:
            defer_batch_norm(stage)
    x, y = torch.randn(2, 10, WIDTH, 4, 4)

    against_reference(stages, plan, x, y)

    counts = [int(stage[1].num_batches_tracked) for stage in stages]
    assert counts == [1 if deferred else 4] * plan.stages


def test_a_deferred_norm_is_the_same_object_with_the_same_keys() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3))
    before, parts = list(model.state_dict()), list(model)
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3))

    assert defer_batch_norm(model) is model

    assert list(model) == parts
    assert list(model.state_dict()) == before
    assert [n for n, _ in model.named_buffers()] == [
        n for n, _ in plain.named_buffers()
    ]
    plain.load_state_dict(model.state_dict())
    defer_batch_norm(model)  # once is enough
    model.eval()
    x = torch.randn(4, 3)
    assert torch.equal(model[0](x), plain.eval()[0](x))


def test_a_step_that_fails_moves_nothing() -> None:
    stages = norm_first()
    defer_batch_norm(stages[0])
    before = copy.deepcopy(stages[0].state_dict())
    x = torch.randn(8, WIDTH, dtype=torch.float64)
    pipeline = Pipeline(stages, schedule(), mse)

    def fail(*_: object) -> None:
        raise ValueError("no")

    hook = stages[1].register_forward_hook(fail)
    with pytest.raises(Exception, match="no"):
        pipeline.step(x, x)
    hook.remove()

    assert same(list(before.values()), list(stages[0].state_dict().values()))
    whole = copy.deepcopy(norm_first()[0][0])
    whole(x)
    pipeline.step(x, x)
    assert near(stages[0][0].running_mean, whole.running_mean, 1e-13)


def test_other_batch_norms_are_refused() -> None:
    with pytest.raises(ModelError, match="SyncBatchNorm cannot be deferred"):
        defer_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)))

    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    defer_batch_norm(untracked)
    assert type(untracked) is nn.BatchNorm1d
