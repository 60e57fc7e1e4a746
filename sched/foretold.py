"""The most bytes at once of a step of a program, links being free.

Instructions start when what they wait for is over, in the program's order; it is what
a simulation with free links does, and so comes to what that says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number
from pipeproof.sched.holdings import Held, held_as
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Kind
from pipeproof.sched.matching import meeting
from pipeproof.sched.memory import Ledger
from pipeproof.sched.program import Program
from pipeproof.sched.trace import Timetable, Trace
from pipeproof.sched.weights import Sizes

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Times:
    """Of each stage, for one micro-batch.

    Attributes:
        forward, backward: of F and B; each half of B takes half as long.
        again: of R.
    """

    forward: list[float]
    backward: list[float]
    again: list[float]

    def of(self, kind: int, stage: int) -> float:
        """Of one op."""
        match kind:
            case Kind.F:
                return self.forward[stage]
            case Kind.R:
                return self.again[stage]
            case Kind.B:
                return self.backward[stage] / 2 + self.backward[stage] / 2
            case Kind.I | Kind.W:
                return self.backward[stage] / 2
        return 0


def foretold(
    program: Program, times: Times, numbers: Floats, over: Floats
) -> list[Number]:
    """Of each device, of what comes and goes.

    Args:
        program: lowered.
        times: of its ops.
        numbers: bytes, [`Held`, stage].
        over: of each of its schedule's skips, the bytes that go over it.
    """
    start, end = _played(program, times)
    weight, arriving = _weights(program, numbers, over)
    sizes = Sizes(weight, weight)
    trace = Trace(program, Timetable(start, end), "predicted", sizes)
    return Ledger(trace, weight, arriving=arriving).peaks()


def _played(program: Program, times: Times) -> tuple[Floats, Floats]:
    """When each instruction starts, and when it ends."""
    waits = program.waits_for.to_lists()
    before, after = meeting(program, program.stream)
    if len(before):
        waits = [list(of) for of in waits]  # those that are empty are one
        for first, then in zip(before.tolist(), after.tolist()):
            waits[then].append(first)
    sender = np.full(len(program), -1, dtype=np.int64)
    sender[program.recv_of] = program.send_of
    free = [0.0] * len(program.streams)
    start, end = [0.0] * len(program), [0.0] * len(program)
    columns = program.stream.tolist(), sender.tolist(), waits, _took(program, times)
    for index, (stream, sent, needs, took) in enumerate(zip(*columns)):
        ready = max([free[stream], *[end[need] for need in needs]])
        start[index] = ready
        over = ready + took
        if sent >= 0:
            over = max(ready, end[sent])
        end[index] = free[stream] = over
    return np.array(start), np.array(end)


def _took(program: Program, times: Times) -> list[float]:
    ops, slices = program.schedule.ops, program.schedule.slices
    of_kind = [
        [times.of(kind, stage) / slices for stage in range(program.schedule.stages)]
        for kind in range(len(Kind))
    ]
    kinds, stages = ops.kind.tolist(), ops.stage.tolist()
    took = [0.0] * len(program)
    first, count = program.first_op.tolist(), program.op_count.tolist()
    for index in program.computes.tolist():
        for op in range(first[index], first[index] + count[index]):
            took[index] += of_kind[kinds[op]][stages[op]]
    return took


def _weights(
    program: Program, numbers: Floats, over: Floats
) -> tuple[Floats, NDArray[Any]]:
    """Of each buffer, and until a forward takes up what has arrived in it."""
    numbers, over = numbers / program.schedule.slices, over / program.schedule.slices
    held, whole = held_as(program)
    stage = program.buffers[:, 2]
    weight = np.where(held >= 0, numbers[held, stage], 0)
    weight[whole] += numbers[held[whole] + 1, stage[whole]]
    arriving = weight.copy()
    stored = program.buffers[:, 0] == BufferKind.STORED_INPUT
    weight[stored] = numbers[Held.STORED, stage[stored]]
    if len(program.buffer_skips):
        goes = (program.buffer_skips >= 0) & (held >= 0)
        for column in (weight, arriving):
            column[goes] = over[program.buffer_skips[goes]]
    return weight, arriving
