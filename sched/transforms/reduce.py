"""Where gradients are summed over replicas and data-parallel peers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import Kind, Op, Ops, Schedule, op

LAST = (Kind.B, Kind.W)
"""After which a stage's gradient has all of a micro-batch."""


def reduce_gradients(schedule: Schedule) -> Schedule:
    """Give each stage a REDUCE on each device that holds it.

    It stands behind the stage's last B or W on the device, so that it runs while the
    device drains. With data-parallel peers of each device, that is when they sum the
    stage's gradient. Stages that have one keep it where it is.

    Args:
        schedule: of one step.

    Raises:
        ParameterError: several steps.
    """
    if schedule.steps > 1:
        raise ParameterError(
            f"{schedule.summary}: reduce_gradients takes a schedule of one step, got "
            f"{schedule.steps}"
        )
    held: list[set[int]] = [set() for _ in range(schedule.devices)]
    for pipe in schedule.placement.pipes:
        for stage, device in enumerate(pipe):
            held[device].add(stage)
    rows = []
    for device, stages in enumerate(held):
        row = schedule.row(device)
        reduced = set(row.stage[row.kind == Kind.REDUCE].tolist())
        rows.append(reduced_behind(row, stages - reduced))
    return schedule.with_rows(rows)


def reduced_behind(row: Ops, stages: Iterable[int]) -> list[Op | Ops]:
    """A device's row with a REDUCE of each stage behind its last backward.

    Args:
        row: of one device.
        stages: whose REDUCE to add; one without a backward gets it at the end.
    """
    ends: dict[int, int] = {}
    for stage in stages:
        mine = (row.stage == stage) & np.isin(row.kind, LAST)
        end = int(np.flatnonzero(mine).max(initial=-1)) + 1
        while 0 < end < len(row) and row.joined[end]:
            end += 1
        ends[stage] = end or len(row)
    parts: list[Op | Ops] = []
    begin = 0
    for stage in sorted(ends, key=lambda stage: (ends[stage], stage)):
        parts += [row[begin : ends[stage]], op(Kind.REDUCE, stage)]
        begin = ends[stage]
    return [*parts, row[begin:]]
