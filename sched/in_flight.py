"""How much of each stage a schedule runs and keeps, whatever ops take.

A device runs its ops in order, so how many activations of each of its stages it
holds at once follows from the order alone::

    device 0 | F0 F1 F2 B0 F3 B1 B2 B3      at most 3 of stage 0

What is on its way between stages `in_transit` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.in_transit import Changes, moment_of_op, stages_held
from pipeproof.sched.ir import Kind, Schedule

Floats = NDArray[np.float64]

KEPT = 3
"""Classes of what stages keep."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """By device and stage, in micro-batches; a slice is a part of one.

    Attributes:
        forwards: [device, stage] that a step runs, recomputations included.
        recomputations: likewise, of these alone.
        backwards: likewise; an I and its W are one.
        peaks: of each device, [moment, class, stage] that it holds; of all moments
            those than which no other holds as much of everything. The classes are
            activations that a forward kept whole; what it stored for an R; and what
            an R has added to that.
    """

    forwards: Floats
    recomputations: Floats
    backwards: Floats
    peaks: list[Floats]


def in_flight(schedule: Schedule) -> InFlight:
    """Count.

    An activation is there from F until B or W; of one that will be recomputed F stores
    a part, and R adds the rest. What is offloaded is not there in between.
    """
    ops = schedule.ops
    device, part = schedule.device_of_op, 1 / schedule.slices
    size = schedule.devices, schedule.stages
    forwards, recomputations, backwards = np.zeros((3, *size))
    again = ops.kind == Kind.R
    ran = again | (ops.kind == Kind.F)
    ended = np.isin(ops.kind, (Kind.B, Kind.W))
    for found, these in (
        (forwards, ran),
        (recomputations, again),
        (backwards, ended),
    ):
        np.add.at(found, (device[these], ops.stage[these]), part)

    peaks = []
    for held, live in zip(stages_held(schedule), live_at_moments(schedule)):
        # Waiting stored inputs, in case one should weigh more than the activations
        # that it is said to be part of.
        waiting = live[:, 1:2] - live[:, 2:3]
        found = largest(np.concatenate([live, waiting], axis=1))[:, :KEPT]
        peaks.append(np.zeros((*found.shape[:2], schedule.stages)))
        peaks[-1][..., held] = found
    return InFlight(forwards, recomputations, backwards, peaks)


def live_at_moments(schedule: Schedule) -> list[Floats]:
    """Of each device, [moment, class, stage held] that it keeps, as in `InFlight`.

    The moments are those of `in_transit`.
    """
    ops, device = schedule.ops, schedule.device_of_op
    has_r = schedule.table.has(Kind.R)[ops.micro_batch, ops.slice, ops.stage]
    ended = np.isin(ops.kind, (Kind.B, Kind.W))
    first, again = ops.kind == Kind.F, ops.kind == Kind.R
    born = [(first & ~has_r) | (ops.kind == Kind.RELOAD), first & has_r, again]
    died = [(ended & ~has_r) | (ops.kind == Kind.OFFLOAD), *[ended & has_r] * 2]
    moment, part = moment_of_op(schedule), 1 / schedule.slices
    changes = Changes.of(schedule, KEPT)
    for of_class in range(KEPT):
        # What an op makes is there while what it ends still is.
        for later, these, by in ((0, born, part), (1, died, -part)):
            which = np.flatnonzero(these[of_class])
            place = device[which], of_class, ops.stage[which]
            changes.add(moment[which] + later, *place, by)
    return changes.totals()


def largest(moments: Floats) -> Floats:
    """Of [moment, class, stage] those than which no other has as much of everything."""
    rows = np.unique(moments.reshape(len(moments), -1), axis=0)[::-1]
    kept: list[NDArray[np.float64]] = []
    for row in rows:  # descending, so none later covers an earlier one
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, *moments.shape[1:])
