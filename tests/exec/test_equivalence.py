"""One schedule, the same gradient: against the reference and one full batch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    DTYPES,
    EXECUTED,
    against_reference,
    as_said,
    batch_of,
    close,
    full_batch,
    grads,
    mlp,
    models,
    same,
    schedules,
    small,
)
from strategies import whole_language
from torch import nn
from torch.nn import functional

from pipeproof.exec import EXAMPLES, Pipeline, reference
from pipeproof.sched import (
    B,
    F,
    Schedule,
    catalog,
    recompute,
)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), schedule=schedules(), dtype=st.sampled_from(DTYPES))
def test_bitwise_equal_to_the_reference(
    data: st.DataObject, schedule: Schedule, dtype: torch.dtype
) -> None:
    sliced = schedule.slices > 1
    stages = data.draw(models(schedule.stages, dtype, sequence=sliced))
    rows = data.draw(st.integers(schedule.micro_batches, 3 * schedule.micro_batches))
    positions = data.draw(st.integers(schedule.slices, 7)) if sliced else 0

    against_reference(stages, schedule, *batch_of(stages, rows, dtype, positions))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), schedule=schedules())
def test_close_to_one_full_batch_dropout_included(
    data: st.DataObject, schedule: Schedule
) -> None:
    sliced = schedule.slices > 1
    stages = data.draw(models(schedule.stages, torch.float64, sequence=sliced))
    rows = data.draw(st.integers(schedule.micro_batches, 3 * schedule.micro_batches))
    positions = data.draw(st.integers(schedule.slices, 7)) if sliced else 0
    inputs, targets = batch_of(stages, rows, torch.float64, positions)
    twin = copy.deepcopy(stages)
    torch.manual_seed(5)
    drawn = int(torch.empty((), dtype=torch.int64).random_())
    whole = full_batch(twin, schedule, drawn)
    functional.mse_loss(whole(inputs), targets).backward()

    torch.manual_seed(5)
    Pipeline(stages, schedule, functional.mse_loss).step(inputs, targets)

    assert close(grads(stages), grads(twin))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), schedule=whole_language(), dtype=st.sampled_from(DTYPES))
def test_whatever_can_be_said_is_bitwise_equal_to_the_reference(
    data: st.DataObject, schedule: Schedule, dtype: torch.dtype
) -> None:
    """Pipes, slices, groups, copies, skips, ties, split and recomputed backwards."""
    stages = data.draw(models(schedule.stages, dtype, sequence=True))
    stages = as_said(stages, schedule)
    rows = data.draw(st.integers(schedule.micro_batches, 3 * schedule.micro_batches))

    against_reference(stages, schedule, *batch_of(stages, rows, dtype, 5))


@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("model", EXAMPLES)
def test_every_row_trains_the_examples(name: str, model: str) -> None:
    schedule = small(name)
    example = EXAMPLES[model](
        stages=schedule.stages,
        batch=schedule.micro_batches + 2,
        slices=schedule.slices,
        dtype=torch.float32,
    )

    against_reference(
        example.stages, schedule, example.inputs, example.targets, example.loss_fn
    )


@pytest.mark.parametrize("name", EXECUTED)
def test_two_steps_without_zeroing_give_twice_the_gradient(name: str) -> None:
    schedule = small(name)
    stages = mlp(schedule.stages)
    positions = 4 if schedule.slices > 1 else 0
    inputs, targets = batch_of(stages, 10, torch.float64, positions)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)

    pipeline.step(inputs, targets)
    once = [2 * grad for grad in grads(stages)]
    pipeline.step(inputs, targets)

    assert close(grads(stages), once)


def test_the_reference_is_the_plain_loop() -> None:
    """Where all stages have one order it is `loss.backward()` in that order."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    stages = mlp(2)
    inputs, targets = batch_of(stages, 7, torch.float64)
    twin = copy.deepcopy(stages)

    total = reference(stages, schedule, functional.mse_loss, inputs, targets)

    loss = torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs.tensor_split(3), targets.tensor_split(3)):
        part = functional.mse_loss(twin[1](twin[0](x)), y) * (len(x) / 7)
        part.backward()
        loss += part.detach()
    assert torch.equal(total, loss)
    assert same(grads(stages), grads(twin))


def test_stages_may_differ_in_their_order_of_backwards() -> None:
    schedule = Schedule.of(
        [
            [F(0, 0), F(0, 1), F(0, 2), B(0, 2), B(0, 0), B(0, 1)],
            [F(1, 1), B(1, 1), F(1, 0), F(1, 2), B(1, 2), B(1, 0)],
        ]
    )
    stages = mlp(2)

    against_reference(stages, schedule, *batch_of(stages, 5, torch.float64))


def test_any_placement_runs_with_hops_on_one_device() -> None:
    """A V on two devices: the turn is handed over, not sent."""
    schedule = Schedule.parse(
        """\
devices: 2
placement: v
micro-batches: 2

device 0 | 0F0 0F1 3F0 3B0 0R0 0B0 3F1 3B1 0B1
device 1 | 1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1
"""
    )
    stages = mlp(4)

    against_reference(stages, schedule, *batch_of(stages, 5, torch.float64))


def test_a_w_that_overlaps_an_earlier_i_keeps_its_place() -> None:
    """I2 was run as one with W2 behind its group, and so before the group's W1."""
    schedule = Schedule.parse(
        """\
devices: 1
placement: linear
micro-batches: 3

device 0 | 0F0 0F1 0F2 0B0 0I1 (0I2&0W1) 0W2
"""
    )
    for seed in range(20):  # of three numbers, sums in other orders may be equal
        torch.manual_seed(seed)
        stages = [nn.Linear(8, 8)]

        against_reference(stages, schedule, *torch.randn(2, 3, 8))


def test_one_entry_per_device_is_the_same_as_one_for_all() -> None:
    schedule = recompute(catalog.make("1f1b", devices=3, micro_batches=4), "always")
    stages = mlp(3)

    against_reference_on = Pipeline(
        stages, schedule, functional.mse_loss, devices=["cpu"] * 3
    )
    twin = copy.deepcopy(stages)
    inputs, targets = batch_of(stages, 9, torch.float64)

    against_reference_on.step(inputs, targets)
    Pipeline(twin, schedule, functional.mse_loss).step(inputs, targets)

    assert same(grads(stages), grads(twin))
