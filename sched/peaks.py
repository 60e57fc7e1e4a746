"""The most that is alive at once on each device, without sorting.

Births and deaths of what ops keep come in the program's order in order of time too, so
one pass is enough. Copies run beside the ops, and where there are any, the streams'
events are merged, each in order for itself. Right for numbers whose sums do not depend
on their order; `pipeproof.sched.memory` sorts the events of all else.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.changes import HERE, cells_of, changes, rows_of
from pipeproof.sched.exact import Number, plain, whole
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Kind
from pipeproof.sched.kernels import run
from pipeproof.sched.merging import peaks_with_copies
from pipeproof.sched.program import Program
from pipeproof.sched.touches import Touch
from pipeproof.sched.weights import Weights

LARGEST = 2**62
"""No sum of weights may reach it."""

_GRADIENT, _ON_HOST = int(BufferKind.GRADIENT), int(BufferKind.HOST)


def peaks_by_op(
    program: Program, weights: Weights, start: NDArray[Any], end: NDArray[Any]
) -> list[Number | None] | None:
    """The peaks of activations and weight stashes, from what ops do to them.

    Nothing is asked of each buffer, which need not be worked out for it.

    Returns:
        None for a device whose events are not in order; and None for all where other
        buffers count, or the numbers or the program do not allow it.
    """
    schedule, ops = program.schedule, program.schedule.ops
    counted = weights.by_kind.keys() <= {BufferKind.ACTIVATION, BufferKind.WEIGHT_STASH}
    if not counted or not program.storage.by_op:
        return None
    kept, stashed = (
        weights.by_kind.get(kind, np.zeros(4 * cells_of(schedule), dtype=np.int64))
        for kind in (BufferKind.ACTIVATION, BufferKind.WEIGHT_STASH)
    )
    numbers, parts = whole(np.concatenate([kept, stashed]))
    if numbers.dtype != np.int64 or int(numbers.max()) * len(ops) >= LARGEST:
        return None
    if schedule.has(Kind.OFFLOAD):
        return _peaks(peaks_with_copies(program, numbers, start, end), parts)
    columns: list[NDArray[Any]] = [
        program.computes,
        program.first_op,
        program.op_count,
        program.stream,
        np.array([stream.device for stream in program.streams], dtype=np.int32),
        rows_of(schedule),
        changes(Touch.WRITE, numbers, HERE),
        changes(Touch.TAKE, numbers, HERE),
        start,
        end,
        np.zeros(schedule.devices, dtype=np.int64),
        np.zeros(schedule.devices, dtype=start.dtype),
        np.zeros(schedule.devices, dtype=np.int64),
    ]
    run(_live, columns, results=[12], size=len(program.computes))
    return _peaks(columns[12], parts)


def _peaks(found: NDArray[np.int64], parts: int) -> list[Number | None]:
    return [None if n < 0 else plain(Fraction(n, parts)) for n in found.tolist()]


def _live(
    computes: Any,
    first_op: Any,
    op_count: Any,
    stream: Any,
    device: Any,
    row: Any,
    grows: Any,
    shrinks: Any,
    start: Any,
    end: Any,
    live: Any,
    last: Any,
    peak: Any,
) -> None:
    """Births at the start of each instruction, deaths at its end."""
    for place in range(len(computes)):
        i = computes[place]
        on = device[stream[i]]
        begin = first_op[i]
        behind = begin + op_count[i]
        for deaths in range(2):
            when = end[i] if deaths else start[i]
            for op in range(begin, behind):
                change = -shrinks[row[op]] if deaths else grows[row[op]]
                if change == 0:
                    continue
                if when < last[on]:
                    peak[on] = -1
                last[on] = when
                live[on] += change
                if peak[on] >= 0 and live[on] > peak[on]:
                    peak[on] = live[on]


def peaks_by_buffer(
    program: Program, weight: NDArray[Any], start: NDArray[Any], end: NDArray[Any]
) -> list[Number | None] | None:
    """The peaks of all that a program's buffers weigh.

    Args:
        program: what ran.
        weight: of each buffer.
        start: of each instruction.
        end: of each instruction.

    Returns:
        None for a device whose events are not in order; and None for all where the
        numbers do not allow it.
    """
    weight, parts = whole(weight)
    if weight.dtype != np.int64 or end.dtype == object:
        return None
    if int(weight.max(initial=0)) * len(weight) >= LARGEST:
        return None
    devices = program.schedule.devices
    columns: list[NDArray[Any]] = [
        program.writes.offsets,
        program.writes.values,
        program.frees.offsets,
        program.frees.values,
        program.buffers[:, 0],
        program.buffers[:, 1],
        weight,
        start,
        end,
        np.zeros(len(program.buffers), dtype=np.int8),
        np.zeros(devices, dtype=np.int64),
        np.zeros(devices, dtype=start.dtype),
        np.zeros(devices, dtype=np.int64),
    ]
    run(_sweep, columns, results=[12], size=len(program))
    return _peaks(columns[12], parts)


def _sweep(
    writes_at: Any,
    writes: Any,
    frees_at: Any,
    frees: Any,
    kind: Any,
    device: Any,
    weight: Any,
    start: Any,
    end: Any,
    born: Any,
    live: Any,
    last: Any,
    peak: Any,
) -> None:
    """Births at the start of each instruction, deaths at its end."""
    for i in range(len(start)):
        for place in range(writes_at[i], writes_at[i + 1]):
            buffer = writes[place]
            if weight[buffer] == 0 or born[buffer]:
                continue
            if kind[buffer] == _GRADIENT or kind[buffer] == _ON_HOST:
                continue
            born[buffer] = 1
            on = device[buffer]
            live[on] += weight[buffer]
            if start[i] < last[on]:
                peak[on] = -1
            last[on] = start[i]
            if peak[on] >= 0 and live[on] > peak[on]:
                peak[on] = live[on]
        for place in range(frees_at[i], frees_at[i + 1]):
            buffer = frees[place]
            if born[buffer] == 0:
                continue
            on = device[buffer]
            live[on] -= weight[buffer]
            if end[i] < last[on]:
                peak[on] = -1
            last[on] = end[i]
