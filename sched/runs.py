"""How much of each stage a schedule runs, whatever ops take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.ir import Kind, Schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Runs:
    """By device and stage, in micro-batches; a slice is a part of one.

    Attributes:
        forwards: [device, stage] that a step runs, recomputations included.
        recomputations: likewise, of these alone.
        backwards: likewise; an I and its W are one.
    """

    forwards: Floats
    recomputations: Floats
    backwards: Floats


def runs_of(schedule: Schedule) -> Runs:
    """Count."""
    ops = schedule.ops
    again = ops.kind == Kind.R
    found = []
    for these in (
        again | (ops.kind == Kind.F),
        again,
        np.isin(ops.kind, (Kind.B, Kind.W)),
    ):
        counts = np.zeros((schedule.devices, schedule.stages))
        place = schedule.device_of_op[these], ops.stage[these]
        np.add.at(counts, place, 1 / schedule.slices)
        found.append(counts)
    return Runs(*found)
