"""Modules that remember: buffers and attributes that forwards change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import against_reference, mlp
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ModelError, Pipeline
from pipeproof.sched import Schedule, catalog, recompute

mse = functional.mse_loss
pytestmark = pytest.mark.usefixtures("one_thread")
PLANS = ["1f1b", "gpipe", "zb-h1", "zb-v"]


def plan(name: str, policy: Any) -> Schedule:
    made = catalog.make(name, devices=2, micro_batches=4)
    return recompute(made, policy)


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, 9, 4, dtype=torch.float64)
    return x, y


class Fading(nn.Module):
    """Multiplies by a buffer, and changes it: autograd saves what it was."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.9)
        return x * self.scale


class Unseen(Fading):
    """As vector quantisers change their codes: no version tells of it."""

    def forward(self, x: Tensor) -> Tensor:
        found = x * self.scale
        self.scale.data.mul_(0.9)
        return found


class Replaced(Fading):
    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 0.9
        return x * self.scale


class Late(nn.Module):
    """Makes its buffer when it is first called."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.new_ones(4))
        self.scale.mul_(0.9)
        return x * self.scale


class Counting(nn.Module):
    """What it computes depends on how often it was called, which no buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.before = getattr(self, "last", x).detach()[:1]
        self.last = x.detach()
        return x * self.calls + self.before


class Reading(Fading):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Both(nn.Module):
    """One buffer in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Fading(), Reading()
        self.second.scale = self.first.scale

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


@pytest.mark.parametrize("policy", ["never", "always", "except-last"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", [Fading, Unseen, Replaced, Late, Counting, Both])
def test_each_micro_batch_has_what_its_forward_found(
    kind: type[nn.Module], name: str, policy: str
) -> None:
    made = plan(name, policy)
    stages = [nn.Sequential(*mlp(1), kind()) for _ in range(made.stages)]
    _, twin = against_reference(stages, made, *rows())

    if kind is Counting:
        assert [s[1].calls for s in stages] == [s[1].calls for s in twin]


def test_buffers_are_the_same_objects_after_a_step_and_after_one_that_failed() -> None:
    """An optimizer of averages may hold them, and views."""
    stages = [nn.Sequential(*mlp(1), Fading()) for _ in range(2)]
    before = [stage[1].scale for stage in stages]
    pipeline = Pipeline(stages, plan("1f1b", "never"), mse)
    pipeline.step(*rows())
    assert [x.tolist() for x in before] == [[pytest.approx(0.9**4)] * 4] * 2

    def fail(*_: object) -> None:
        if stages[1][1].scale[0] < 0.9**6:
            raise ValueError("no")

    stages[1][1].register_forward_hook(fail)
    with pytest.raises(Exception, match="no"):
        pipeline.step(*rows())
    assert all(a is stage[1].scale for a, stage in zip(before, stages))


class NormedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return mse(self.norm(output), targets)


@pytest.mark.parametrize("policy", ["never", "always"])
def test_a_loss_is_recomputed_as_its_stage_is(policy: str) -> None:
    """Its running statistics count each micro-batch once."""
    losses = [NormedLoss(), NormedLoss()]
    x, y = rows()
    stages, whole = mlp(2), nn.Sequential(*mlp(2))
    Pipeline(stages, plan("1f1b", policy), losses[0]).step(x, y)
    for part, labels in zip(x.tensor_split(4), y.tensor_split(4)):
        losses[1](whole(part), labels)

    ours, theirs = (list(loss.buffers()) for loss in losses)
    assert all(map(torch.allclose, ours, theirs))


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(4), Fading])
def test_state_of_two_stages_is_refused(make: Any, policy: str) -> None:
    """The second stage's first micro-batch may come before the first one's last."""
    shared = make().double()
    stages = [nn.Sequential(*mlp(1), shared) for _ in range(2)]
    pipeline = Pipeline(stages, plan("1f1b", policy), mse)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"stages 0 and 1 share a \w+, which"):
            pipeline.step(*rows())

    shared.eval()
    if isinstance(shared, nn.BatchNorm1d):
        pipeline.step(*rows())
