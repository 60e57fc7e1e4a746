"""The models that the experiment trains, for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import real_work
import torch
from real_work import Task
from torch.nn import functional

from pipeproof.exec import Pipeline, split_evenly

STEPS = 2
MAKERS = (real_work.classify, real_work.denoise)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", real_work.schedules())
def test_a_curve_is_that_of_the_plain_loop(
    make: Callable[[int], Task], name: str
) -> None:
    task = make(STEPS)
    schedule = real_work.schedules()[name]

    found = real_work.pipelined(task, schedule)

    assert len(found.losses) == STEPS
    assert found.equals(real_work.looped(task, schedule))


def test_the_skips_go_past_the_stages_between() -> None:
    """The outer one from the first stage to the last, the inner one to the third."""
    layers = real_work.u_net_layers()
    stages = split_evenly(layers, real_work.STAGES)
    schedule = real_work.schedules()["1f1b"]
    handed_on: list[Any] = []
    for stage in stages[1:3]:
        stage[-1].register_forward_hook(lambda *call: handed_on.append(call[-1]))
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    x = torch.randn(schedule.micro_batches, 1, 8, 8)
    pipeline.step(x, x)

    assert pipeline.schedule.skips == ((0, 2), (0, 3))
    assert len(handed_on) == 2 * schedule.micro_batches
    assert all(isinstance(value, torch.Tensor) for value in handed_on)
    between = {
        str(message)
        for message in map(
            pipeline.program.message_at, range(pipeline.program.message_count)
        )
    }
    assert {"activation 0→3:0", "gradient 3→0:0", "activation 0→2:7"} <= between
