"""What is proved is what runs, and it trains as without a pipeline, bit by bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from models import against_reference, as_said, batch_of, mlp
from strategies import schedules, whole_language
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.sched import Certificate, Schedule, prove


@settings(max_examples=15)
@given(schedule=schedules() | whole_language())
def test_any_schedule_is_proved_and_trains_right(schedule: Schedule) -> None:
    stages = as_said(mlp(schedule.stages), schedule)
    pipeline = Pipeline(stages, schedule, functional.mse_loss)
    assert isinstance(prove(schedule), Certificate)
    assert isinstance(prove(pipeline.program), Certificate)

    positions = schedule.slices + 1 if schedule.slices > 1 else 0
    rows = schedule.micro_batches + 1
    against_reference(
        stages, schedule, *batch_of(stages, rows, torch.float64, positions)
    )
