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
        backwards: likewise; an I and its W are one.
        peaks: of each device, [moment, (activations, stored inputs), stage] that it
            holds; of all moments those than which no other holds as much of
            everything.
    """

    forwards: Floats
    backwards: Floats
    peaks: list[Floats]


def in_flight(schedule: Schedule) -> InFlight:
    """Count.

    An activation is there from F, or from its R, until B or W; of one that will be
    recomputed F leaves the stage's input. What is offloaded is not there in between.
    """
    ops, table = schedule.ops, schedule.table
    device, part = schedule.device_of_op, 1 / schedule.slices
    size = schedule.devices, schedule.stages
    forwards, backwards = np.zeros(size), np.zeros(size)
    ran = np.isin(ops.kind, (Kind.F, Kind.R))
    np.add.at(forwards, (device[ran], ops.stage[ran]), part)
    ended = np.isin(ops.kind, (Kind.B, Kind.W))
    np.add.at(backwards, (device[ended], ops.stage[ended]), part)

    again = table.has(Kind.R)[ops.micro_batch, ops.slice, ops.stage]
    born, died = np.zeros((2, len(ops), 2))
    is_first = ops.kind == Kind.F
    born[:, 0] = (is_first & ~again) | np.isin(ops.kind, (Kind.R, Kind.RELOAD))
    # A stored input is part of the activations from R on.
    born[:, 1] = (is_first & again) - 1.0 * (ops.kind == Kind.R)
    died[:, 0] = ended | (ops.kind == Kind.OFFLOAD)
    peaks = []
    for number in range(schedule.devices):
        mine = np.flatnonzero(device == number)
        held, column = np.unique(ops.stage[mine], return_inverse=True)
        change = np.zeros((2, len(mine), 2, len(held)))
        rows = np.arange(len(mine))
        change[0, rows, :, column] = born[mine] * part
        change[1, rows, :, column] = died[mine] * part
        # What an op makes is there while what it ends still is.
        live = np.cumsum(change[0] - change[1], axis=0) + change[1]
        largest = _largest(live)
        peaks.append(np.zeros((*largest.shape[:2], schedule.stages)))
        peaks[-1][..., held] = largest
    return InFlight(forwards, backwards, peaks)


def _largest(live: Floats) -> Floats:
    """Of these moments those than which no other has as much of everything."""
    rows = np.unique(live.reshape(len(live), -1), axis=0)[::-1]
    kept: list[NDArray[np.float64]] = []
    for row in rows:  # descending, so none later covers an earlier one
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept).reshape(-1, *live.shape[1:])
