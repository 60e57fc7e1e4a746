"""The models that the experiment trains, for a few steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import real_work
import torch
from real_work import Task

from pipeproof.exec import split_evenly

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


def test_the_outer_skip_is_handed_on_through_every_stage() -> None:
    stages = split_evenly(real_work.u_net_layers(), real_work.STAGES)

    first = stages[0](torch.randn(2, 1, 8, 8))
    assert [tuple(part.shape) for part in first] == [
        (2, 32, 2, 2),
        (2, 16, 8, 8),
        (2, 32, 4, 4),
    ]
    second = stages[1](first)
    third = stages[2](second)
    assert second[1] is third[1] is first[1]
    assert [tuple(part.shape) for part in third] == [(2, 32, 4, 4), (2, 16, 8, 8)]
    assert stages[3](third).shape == (2, 1, 8, 8)
