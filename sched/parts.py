"""Stretches of a trace's time, each with the one instruction that ran in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, column, plain
from pipeproof.sched.instructions import Action, StreamKind

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

Index = NDArray[np.int64]
Times = NDArray[Any]

LATE = len(Action)
"""In place of an action: nothing ran, though it could have."""


@dataclass(frozen=True, eq=False)
class Parts:
    """Stretches of time and what held up all behind them, latest first.

    Attributes:
        of: which of the walks each belongs to.
        instruction: that ran; where it is `late`, that could have run and did not.
        late: whether nothing was missing, and yet nothing ran.
        start, end: in the trace's unit of time.
    """

    trace: Trace
    of: Index
    instruction: Index
    late: NDArray[np.bool_]
    start: Times
    end: Times

    def __len__(self) -> int:
        return len(self.of)

    @property
    def duration(self) -> Times:
        """Of each part."""
        return self.end - self.start

    def by_name(self, *, kinds: bool = False) -> dict[str, Number]:
        """Total time by what ran, the longest first: `stage 1`, `link 0→1 transfer`.

        Args:
            kinds: tell the kinds of op apart: `stage 1 F`.
        """
        names, which = self.names(kinds=kinds)
        found = totals(which, self.duration)
        ordered = sorted(found.items(), key=lambda item: (-item[1], names[item[0]]))
        return {names[code]: total for code, total in ordered}

    def names(self, *, kinds: bool = False) -> tuple[list[str], Index]:
        """The different names of what ran, and which of them each part has."""
        return name_of(self.trace, self.instruction, self.late, kinds=kinds)


def totals(which: Index, durations: Times) -> dict[int, Number]:
    """The sum of the durations of each code that occurs."""
    if not len(which):
        return {}
    order = np.argsort(which, kind="stable")
    codes, first = np.unique(which[order], return_index=True)
    sums = np.add.reduceat(durations[order], first)
    return {int(code): plain(total) for code, total in zip(codes, sums.tolist())}


def name_of(
    trace: Trace,
    instructions: Index,
    late: NDArray[np.bool_] | None = None,
    *,
    kinds: bool = False,
) -> tuple[list[str], Index]:
    """What instructions are the work of: a stage, a link, a host, a reduction.

    Args:
        trace: what they are of.
        instructions: of it.
        late: which of them came late: that is the work of nobody.
        kinds: tell the kinds of op apart, and groups of them.

    Returns:
        The different names, and which of them each instruction has.
    """
    program = trace.program
    action = program.action[instructions].astype(np.int64)
    if late is not None:
        action = np.where(late, LATE, action)
    first = program.first_op[instructions]
    stage = np.where(first >= 0, program.schedule.ops.stage[first], 0)
    computes = (action == Action.COMPUTE) | (action == Action.REDUCE)
    place = np.where(computes, stage, program.stream[instructions].astype(np.int64))
    # Of a device, whatever its stream: compute streams come first, by device.
    place = np.where(action == LATE, program.device[instructions], place)
    of_kinds = np.zeros_like(action)
    if kinds:
        of_kinds = _kinds(trace, instructions) * (action == Action.COMPUTE)
    places = 1 + int(place.max(initial=0))
    code = (of_kinds * (len(Action) + 1) + action) * places + place
    distinct, which = np.unique(code, return_inverse=True)
    example = np.empty(len(distinct), dtype=np.int64)
    example[which] = np.arange(len(code))
    names = [
        _name(trace, int(instructions[i]), int(action[i]), int(place[i]), kinds)
        for i in example.tolist()
    ]
    return names, which


def _kinds(trace: Trace, instructions: Index) -> Index:
    """A number for the kinds of an instruction's ops, in any order; 0 for none."""
    program = trace.program
    bits = np.int64(1) << program.schedule.ops.kind.astype(np.int64)
    upto = np.concatenate([[0], np.cumsum(bits)])
    first, count = program.first_op[instructions], program.op_count[instructions]
    result: Index = upto[first + count] - upto[first]
    return np.where(count > 0, result, 0)


def _name(trace: Trace, instruction: int, action: int, place: int, kinds: bool) -> str:
    program = trace.program
    if action == Action.COMPUTE:
        if not kinds:
            return f"stage {place}"
        ops = program[instruction].ops
        return f"stage {place} {'&'.join(sorted(op.kind.name for op in ops))}"
    if action == Action.REDUCE:
        return f"reduction of stage {place}"
    if action == Action.TIE:
        return f"sums of ties on device {trace.program.streams[place].device}"
    stream = program.streams[place]
    match action:
        case Action.SEND:
            return f"link {stream.device}→{stream.peer} transfer"
        case Action.RECV:
            return f"link {stream.peer}→{stream.device} latency"
        case Action.COPY:
            if stream.link is not None:
                return "copies over link {}→{}".format(*stream.link)
            way = "from" if stream.kind == StreamKind.FROM_HOST else "to"
            return f"copies {way} the host of device {stream.device}"
        case Action.LOCAL:
            return f"hand-overs on device {stream.device}"
        case _:
            return f"lateness of device {stream.device}"


def scale_of(*columns: Times) -> int | None:
    """What makes Fractions among these times whole when multiplied; None for none."""
    if all(times.dtype != object for times in columns):
        return None
    return math.lcm(*(t.denominator for times in columns for t in times.tolist()))


def scaled(times: Times, scale: int | None) -> Times:
    """Fractions as ints, which compare and add a hundred times as fast."""
    if scale is None:
        return times
    return column([t.numerator * (scale // t.denominator) for t in times.tolist()])


def unscaled(times: Times, scale: int | None) -> Times:
    """And back."""
    if scale is None:
        return times
    distinct, which = np.unique(times, return_inverse=True)
    exact = [Fraction(time, scale) for time in distinct.tolist()]
    return np.array([*exact, None], dtype=object)[:-1][which]
