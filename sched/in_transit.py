"""Tensors on their way between stages, whatever ops and links take.

A device holds them beside what its stages keep: an output and a gradient until they
are sent, and what it receives from when the receive is posted, which is when its slot
is free::

    device 1 | F0 F1 B0 F2 B1
      input of stage 1, slots 0 and 1    F0 takes slot 0, F1 slot 1, B0 lets go of 0:
                                         behind it the receive of F2's input is posted
      gradient, one slot                 posted from the start; behind B0 for B1

So what lies in its memory follows from the order of its ops and from the program's
slots, as long as links keep up with ops; where receives are posted or messages arrive
later, there is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.ir import Schedule
from pipeproof.sched.lower import lower
from pipeproof.sched.memory import lifetimes
from pipeproof.sched.program import Program

Floats = NDArray[np.float64]
Index = NDArray[np.signedinteger[Any]]

CLASSES = 3
ARRIVING, GOING, RETURNED = range(CLASSES)
"""Classes: inputs that no forward has taken up yet; outputs, and gradients of them;
gradients of inputs."""

_CLASS = {
    BufferKind.INPUT: ARRIVING,
    BufferKind.STORED_INPUT: ARRIVING,
    BufferKind.OUTPUT: GOING,
    BufferKind.OUTPUT_GRAD: GOING,
    BufferKind.INPUT_GRAD: RETURNED,
}


def in_transit(schedule: Schedule) -> list[Floats]:
    """Of each device, [moment, class, stage held]: how many it has, in micro-batches.

    Moment 2k is while the k-th op or overlap group of its row runs, 2k + 1 until the
    next one does, when it hands tensors over to its own stages. The stages are those
    of `stages_held`.

    Args:
        schedule: clean, of one step.

    Raises:
        UnsupportedError: as `lower`.
    """
    program = lower(schedule)
    moment = _moments(program)
    kind, skips = program.buffers[:, 0], program.buffer_skips
    born, died = lifetimes(program)
    reader = np.full(len(kind), len(program), dtype=np.int64)
    reader[program.reads.values[::-1]] = program.reads.owner[::-1]  # the first
    changes = Changes.of(schedule, CLASSES)
    own = skips < 0 if len(skips) else np.ones(len(kind), dtype=np.bool_)
    for member, of_class in _CLASS.items():
        these = np.flatnonzero((kind == member) & own)
        if of_class == ARRIVING:
            came = np.isin(program.action[born[these]], (Action.RECV, Action.LOCAL))
            these = these[came]
            last = moment[reader[these]] - 1
        else:
            last = moment[died[these]]
        place = program.buffers[these, 1], of_class, program.buffers[these, 2]
        changes.add(moment[born[these]], *place, 1 / schedule.slices)
        changes.add(last + 1, *place, -1 / schedule.slices)
    return changes.totals()


def stages_held(schedule: Schedule) -> list[list[int]]:
    """Of each device its stages, ascending."""
    held: list[set[int]] = [set() for _ in range(schedule.devices)]
    for pipe in schedule.placement.pipes:
        for stage, device in enumerate(pipe):
            held[device].add(stage)
    return list(map(sorted, held))


@dataclass(frozen=True)
class Changes:
    """What comes and goes on each device, moment by moment.

    Attributes:
        rows: [moment of any device, class, column]: by how much it grows.
        starts: of each device, its first row, and one behind the last.
        column: [device, stage], its column there.
        held: of each device, how many columns it has.
    """

    rows: Floats
    starts: Index
    column: Index
    held: list[int]

    @classmethod
    def of(cls, schedule: Schedule, classes: int) -> Changes:
        """None yet."""
        starts = np.append(0, np.cumsum(2 * nodes_of_devices(schedule) + 1))
        column = np.zeros((schedule.devices, schedule.stages), dtype=np.int64)
        stages = stages_held(schedule)
        for device, held in enumerate(stages):
            column[device, held] = range(len(held))
        sizes = list(map(len, stages))
        rows = np.zeros((int(starts[-1]), classes, max(sizes)))
        return cls(rows, starts, column, sizes)

    def add(
        self, moment: Index, device: Index, of_class: int, stage: Index, part: Any
    ) -> None:
        """More of a class of stages, from moments of devices on."""
        row = self.starts[device] + moment
        np.add.at(self.rows[:, of_class], (row, self.column[device, stage]), part)

    def totals(self) -> list[Floats]:
        """Of each device, [moment, class, stage held]."""
        ends = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), self.held)
        return [np.cumsum(self.rows[a:b, :, :held], axis=0)[:-1] for a, b, held in ends]


def nodes_of_devices(schedule: Schedule) -> Index:
    """Of each device, how many ops and overlap groups it runs."""
    first = schedule.device_of_op[~schedule.ops.joined]
    return np.bincount(first, minlength=schedule.devices)


def moment_of_op(schedule: Schedule) -> Index:
    """When each op runs on its device, as `in_transit` counts."""
    counts = nodes_of_devices(schedule)
    before = np.cumsum(counts) - counts
    nodes = schedule.node_of_op - before[schedule.device_of_op]
    return 2 * nodes.astype(np.int64)


def _moments(program: Program) -> Index:
    """When each instruction does something to what its device holds."""
    result = np.zeros(len(program), dtype=np.int64)
    ops = program.first_op >= 0
    result[ops] = moment_of_op(program.schedule)[program.first_op[ops]]
    born, _ = lifetimes(program)
    reads, waits = program.reads, program.waits_for
    for action, later in ((Action.SEND, 0), (Action.LOCAL, 1)):
        these = np.flatnonzero(program.action == action)
        read = reads.values[reads.offsets[these]]
        result[these] = result[born[read]] + later
    received = program.action[waits.owner] == Action.RECV
    behind = result[waits.values[received]] + 1
    np.maximum.at(result, waits.owner[received], behind)
    return result
