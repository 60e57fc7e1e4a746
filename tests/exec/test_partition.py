"""Layers profiled where they are, and cut into stages."""

from __future__ import annotations

import pytest
import torch
from models import against_reference
from torch import Tensor, nn

from pipeproof.exec import (
    ActivationMeter,
    ModelError,
    Pipeline,
    profile_layers,
    split_at,
)
from pipeproof.sched import Layer, ParameterError, catalog, partition

mse = nn.functional.mse_loss


def layers(width: int = 32) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Dropout(0.5),
        nn.Linear(4 * width, width),
        nn.Flatten(),
        nn.BatchNorm1d(width),
    ]


def test_bytes_of_a_perceptron() -> None:
    """A micro-batch of 8 rows is 1,024 bytes; the wide layer's 4,096."""
    found = profile_layers(layers(), torch.randn(8, 32), optimizer=2)

    assert [layer.input for layer in found] == [1024] * 3 + [4096] * 3 + [1024] * 2
    # Linear keeps its input and Tanh its output, which is the next one's input.
    assert [layer.activations for layer in found[:4]] == [1024, 1024, 0, 4096]
    assert [layer.keeps_input for layer in found[:4]] == [True, False, False, True]
    square = 4 * (32 * 32 + 32)
    assert found[0].weights == square * 4
    assert found[1].weights == 0
    assert all(layer.forward > 0 for layer in found)


def test_profiling_leaves_everything_as_it_was() -> None:
    stages = layers()
    norm = stages[-1]
    torch.manual_seed(3)
    profile_layers(stages, torch.randn(8, 32).requires_grad_())
    torch.manual_seed(3)
    torch.randn(8, 32)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    profile_layers(stages, torch.randn(8, 32))

    assert torch.equal(torch.rand(1), drawn)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.abs().sum() == 0
    assert all(p.grad is None for stage in stages for p in stage.parameters())


@pytest.mark.parametrize("cuts", [(1, 7), (2, 6), (4, 4), (6, 2)])
def test_the_bytes_of_stages_are_those_that_a_meter_counts(
    cuts: tuple[int, ...],
) -> None:
    """Wherever the cut falls, what both sides need is counted once in each."""
    model = layers()
    rows = 64
    found = profile_layers(model, torch.randn(rows, 32))
    at = cuts[0]

    def of(part: list[Layer]) -> float:
        kept = sum(layer.activations for layer in part)
        return kept + (0 if part[0].keeps_input else part[0].input)

    for part, first in ((model[:at], 0), (model[at:], at)):
        schedule = catalog.make("gpipe", devices=1, micro_batches=1)
        value = torch.randn(rows, int(found[first].input) // rows // 4)
        stage = nn.Sequential(*part)
        pipeline = Pipeline([stage], schedule, lambda y, _: y.sum())
        with ActivationMeter([stage]) as meter:
            pipeline.step(value.requires_grad_(), value)
        assert meter.peak == pytest.approx(
            of(found[first : first + len(part)]), rel=0.01
        )


def test_a_profile_gives_stages_that_train() -> None:
    model = layers()
    schedule = catalog.make("1f1b", devices=3, micro_batches=4)
    inputs, targets = torch.randn(2, 12, 32)

    cuts = partition(profile_layers(model, inputs[:3]), schedule)
    stages = split_at(model, cuts.sizes)

    assert [len(stage) for stage in stages] == list(cuts.sizes)
    against_reference(stages, schedule, inputs, targets)


def test_refusals() -> None:
    with pytest.raises(ModelError, match="stages of 1, 2 layers take 3, found a model"):
        split_at([nn.Identity()] * 4, [1, 2])
    with pytest.raises(ParameterError, match="size of stage 1 must be at least 1"):
        split_at([nn.Identity()] * 4, [4, 0])
    with pytest.raises(ParameterError, match="optimizer must be at least 0"):
        profile_layers(layers(), torch.randn(2, 32), optimizer=-1)

    class Gives(nn.Module):
        def forward(self, x: Tensor) -> set[Tensor]:
            return {x}

    with pytest.raises(ModelError, match="layer 0 returned set"):
        profile_layers([Gives()], torch.randn(2, 32))
