"""Where the weights of stages are updated."""

from __future__ import annotations

import numpy as np

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import Kind, Op, Ops, Schedule, op
from pipeproof.sched.ties import tied_stages
from pipeproof.sched.transforms.reduce import LAST


def with_steps(schedule: Schedule) -> Schedule:
    """Give each stage a STEP on each device that holds it.

    It stands behind the stage's last B or W on the device, so that a device updates
    its weights while others still drain. Where a REDUCE sums the gradient, it stands
    behind the last op of the device's next stage to finish, whose work hides the sum.
    That of a stage which is in a tie waits for other devices, and stands at the end.
    Stages that have one keep it where it is.

    Args:
        schedule: of one step; with `reduce_gradients` before, where there will be
            data-parallel peers, and with its ties.

    Raises:
        ParameterError: several steps.
    """
    if schedule.steps > 1:
        raise ParameterError(
            f"{schedule.summary}: with_steps takes a schedule of one step, got "
            f"{schedule.steps}"
        )
    tied = tied_stages(schedule)
    rows = []
    for device in range(schedule.devices):
        held = {
            stage
            for pipe in schedule.placement.pipes
            for stage, home in enumerate(pipe)
            if home == device
        }
        row = schedule.row(device)
        stepped = set(row.stage[row.kind == Kind.STEP].tolist())
        missing = held - stepped
        last = [op(Kind.STEP, stage) for stage in sorted(missing & tied)]
        rows.append([*_stepped(row, held, missing - tied), *last])
    return schedule.with_rows(rows)


def steps_behind_sums(schedule: Schedule) -> Schedule:
    """With the STEPs of stages that are in ties where they can wait for the sums.

    Behind all other ops of their device, in their order; what has them there is
    returned as it is.
    """
    tied = tied_stages(schedule)
    rows = []
    for device in range(schedule.devices):
        row = schedule.row(device)
        waits = (row.kind == Kind.STEP) & np.isin(row.stage, list(tied))
        rows.append([row.take(~waits), row.take(waits)])
    moved = schedule.with_rows(rows)
    return schedule if moved == schedule else moved


def _stepped(row: Ops, held: set[int], missing: set[int]) -> list[Op | Ops]:
    """A device's row with a STEP of each missing stage.

    Args:
        row: of one device.
        held: the stages there; one without a backward gets its STEP at the end.
        missing: those of them without a STEP.
    """
    ends = {stage: _end(row, stage) for stage in held}
    in_order = sorted(held, key=lambda stage: (ends[stage], stage))
    summed = set(row.stage[row.kind == Kind.REDUCE].tolist())
    parts: list[Op | Ops] = []
    begin = 0
    for stage, following in zip(in_order, [*in_order[1:], None]):
        if stage not in missing:
            continue
        end = ends[stage]
        if stage in summed:
            end = len(row) if following is None else ends[following]
        parts += [row[begin:end], op(Kind.STEP, stage)]
        begin = end
    return [*parts, row[begin:]]


def _end(row: Ops, stage: int) -> int:
    """Behind the last op that adds to a stage's gradient."""
    mine = (row.stage == stage) & np.isin(row.kind, (*LAST, Kind.REDUCE))
    end = int(np.flatnonzero(mine).max(initial=-1)) + 1
    while 0 < end < len(row) and row.joined[end]:
        end += 1
    return end or len(row)
