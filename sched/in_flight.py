"""How much of each stage a schedule runs and keeps, whatever ops take.

A device runs its ops in order, so how many activations of each of its stages it
holds at once follows from the order alone::

    device 0 | F0 F1 F2 B0 F3 B1 B2 B3      at most 3 of stage 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.ir import Kind, Schedule

Floats = NDArray[np.float64]


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
    ops, table = schedule.ops, schedule.table
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

    has_r = table.has(Kind.R)[ops.micro_batch, ops.slice, ops.stage]
    born, died = np.zeros((2, len(ops), 3))
    first = ops.kind == Kind.F
    born[:, 0] = (first & ~has_r) | (ops.kind == Kind.RELOAD)
    born[:, 1] = first & has_r
    born[:, 2] = again
    died[:, 0] = (ended & ~has_r) | (ops.kind == Kind.OFFLOAD)
    died[:, 1] = died[:, 2] = ended & has_r
    peaks = []
    for number in range(schedule.devices):
        mine = np.flatnonzero(device == number)
        held, column = np.unique(ops.stage[mine], return_inverse=True)
        change = np.zeros((2, len(mine), 3, len(held)))
        rows = np.arange(len(mine))
        change[0, rows, :, column] = born[mine] * part
        change[1, rows, :, column] = died[mine] * part
        # What an op makes is there while what it ends still is.
        live = np.cumsum(change[0] - change[1], axis=0) + change[1]
        largest = _largest(live)
        peaks.append(np.zeros((*largest.shape[:2], schedule.stages)))
        peaks[-1][..., held] = largest
    return InFlight(forwards, recomputations, backwards, peaks)


def _largest(live: Floats) -> Floats:
    """Of these moments those than which no other has as much of everything.

    Nor as many stored inputs that wait for their R, in case one should weigh more than
    the activations that it is said to be part of.
    """
    waiting = live[:, 1:2] - live[:, 2:3]
    rows = np.concatenate([live, waiting], axis=1)
    rows = np.unique(rows.reshape(len(live), -1), axis=0)[::-1]
    kept: list[NDArray[np.float64]] = []
    for row in rows:  # descending, so none later covers an earlier one
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, 4, live.shape[2])[:, :3]
