"""Schedules of the same stages with each kind of op.

A schedule has only some kinds of op. What all of them take is measured with variants
of it:

    whole        F B        backwards whole; and the STEPs, where they are measured
    halves       F I W      each W behind the next I, so that no pair runs as one
    recomputed   F R B      where nothing is offloaded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeproof.sched import (
    Kind,
    Op,
    ParameterError,
    Schedule,
    recompute,
    reduce_gradients,
    with_steps,
)
from pipeproof.sched.ir import BESIDE_KINDS

Rows = Callable[[Sequence[Op]], list[Op]]


def variants(schedule: Schedule, *, steps: bool = False) -> dict[str, Schedule]:
    """The schedule with backwards whole, in halves, and with recomputation.

    Args:
        schedule: of the stages.
        steps: add a STEP of each stage to the first of these.

    Raises:
        ParameterError: several steps.
    """
    if schedule.steps > 1:
        raise ParameterError(
            f"{schedule.summary}: a profile takes a schedule of one step, got "
            f"{schedule.steps}"
        )
    whole = _of_rows(schedule, _whole)
    halves = _of_rows(whole, _halves)
    if schedule.has(Kind.REDUCE):
        whole, halves = reduce_gradients(whole), reduce_gradients(halves)
    again = recompute(whole, "always")
    whole = with_steps(whole) if steps else whole
    return {"whole": whole, "halves": halves, "recomputed": again}


def _of_rows(schedule: Schedule, change: Rows) -> Schedule:
    return schedule.with_rows(
        [change(list(schedule.row(device))) for device in range(schedule.devices)]
    )


def _whole(row: Sequence[Op]) -> list[Op]:
    """Only forwards and backwards, each of these where the gradient goes on."""
    dropped = (*BESIDE_KINDS, Kind.R, Kind.W, Kind.STEP)
    return [
        op._replace(kind=Kind.B) if op.kind == Kind.I else op
        for op in row
        if op.kind not in dropped
    ]


def _halves(row: Sequence[Op]) -> list[Op]:
    """Each B as its I, and its W behind the next I."""
    result: list[Op] = []
    waiting: Op | None = None
    last = max((n for n, op in enumerate(row) if op.kind == Kind.B), default=-1)
    for place, op in enumerate(row):
        if op.kind != Kind.B:
            result.append(op)
            continue
        result.append(op._replace(kind=Kind.I))
        if waiting is not None:
            result.append(waiting)
        waiting = op._replace(kind=Kind.W)
        if place == last:
            result.append(waiting)
    return result
