"""Dropout does not depend on how the model is run."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import grads, same
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline, split_evenly
from pipeproof.exec.rng import key
from pipeproof.sched import POLICIES, catalog, recompute


class Noise(nn.Module):
    """Functional dropout, and noise from the default generator."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.3) + 0.1 * torch.randn_like(x)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        part
        for _ in range(4)
        for part in (nn.Linear(4, 4, dtype=torch.float64), nn.Dropout(0.5), Noise())
    ]


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(1, 5),
    name=st.sampled_from(["naive", "gpipe", "1f1b"]),
    policy=st.sampled_from(POLICIES),
)
def test_losses_depend_neither_on_schedule_nor_on_cuts(
    stages: int, name: str, policy: str
) -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)

    def loss_with(parts: int, which: str, how: str) -> Tensor:
        schedule = catalog.make(which, devices=parts, micro_batches=3)
        model = split_evenly(layers(), parts)
        pipeline = Pipeline(model, recompute(schedule, how), functional.mse_loss)
        torch.manual_seed(3)
        return pipeline.step(x, x)

    assert torch.equal(loss_with(stages, name, policy), loss_with(1, "gpipe", "never"))


def test_nested_sequentials_are_cut_the_same_wherever_they_are_wrapped() -> None:
    flat = layers()
    nested = [nn.Sequential(nn.Sequential(*flat[:6]), nn.Sequential(*flat[6:]))]
    x = torch.ones(3, 4, dtype=torch.float64)
    losses = []
    for model in ([copy.deepcopy(flat)], copy.deepcopy(nested)):
        schedule = catalog.make("gpipe", devices=1, micro_batches=3)
        torch.manual_seed(3)
        losses.append(Pipeline(model, schedule, functional.mse_loss).step(x, x))

    assert torch.equal(*losses)


def test_micro_batches_and_units_draw_different_masks() -> None:
    table = {key(0, unit, m) for unit in range(50) for m in range(40)}

    assert len(table) == 50 * 40
    assert len({number & 0xFFFFFFFF for number in table}) == 50 * 40
    assert key(1, 0, 0) not in table


def test_steps_differ_and_take_one_draw_of_the_default_generator() -> None:
    x = torch.ones(4, 4, dtype=torch.float64)
    schedule = catalog.make("gpipe", devices=2, micro_batches=2)
    pipeline = Pipeline(split_evenly(layers(), 2), schedule, functional.mse_loss)
    torch.manual_seed(0)
    first, second = pipeline.step(x, x), pipeline.step(x, x)
    after = torch.rand(3)

    torch.manual_seed(0)
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(after, torch.rand(3))
    assert not torch.equal(first, second)


def test_randomness_in_the_loss_is_keyed_too() -> None:
    def noisy(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output + torch.randn_like(output), target)

    x = torch.ones(4, 4, dtype=torch.float64)
    losses, gradients = [], []
    for name, policy in (("gpipe", "never"), ("1f1b", "always")):
        stages = split_evenly(layers(), 2)
        schedule = recompute(catalog.make(name, devices=2, micro_batches=4), policy)
        torch.manual_seed(9)
        losses.append(Pipeline(stages, schedule, noisy).step(x, x))
        gradients.append([g.abs() > 0 for g in grads(stages)])

    assert torch.equal(*losses)
    assert same(*gradients)
