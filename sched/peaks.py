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

from pipeproof.sched.buffers import AGAIN, HOWS, SPLIT, Block, how_of
from pipeproof.sched.exact import Number, plain, whole
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.program import Action, BufferKind, Program
from pipeproof.sched.touches import Touch, touching
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
        weights.by_kind.get(kind, np.zeros(4 * _cells(schedule), dtype=np.int64))
        for kind in (BufferKind.ACTIVATION, BufferKind.WEIGHT_STASH)
    )
    numbers, parts = whole(np.concatenate([kept, stashed]))
    if numbers.dtype != np.int64 or int(numbers.max()) * len(ops) >= LARGEST:
        return None
    if schedule.has(Kind.OFFLOAD):
        return _peaks(_with_copies(program, numbers, start, end), parts)
    columns: list[NDArray[Any]] = [
        program.computes,
        program.first_op,
        program.op_count,
        program.stream,
        np.array([stream.device for stream in program.streams], dtype=np.int32),
        _rows(schedule),
        _changes(Touch.WRITE, numbers, HERE),
        _changes(Touch.TAKE, numbers, HERE),
        start,
        end,
        np.zeros(schedule.devices, dtype=np.int64),
        np.zeros(schedule.devices, dtype=start.dtype),
        np.zeros(schedule.devices, dtype=np.int64),
    ]
    run(_live, columns, results=[12], size=len(program.computes))
    return _peaks(columns[12], parts)


def _cells(schedule: Schedule) -> int:
    """Stages of all pipes."""
    return len(schedule.placement.pipes) * schedule.stages


def _rows(schedule: Schedule) -> NDArray[np.int32]:
    """For each op where `_changes` has it."""
    table = schedule.table
    columns: list[NDArray[Any]] = [
        schedule.ops.kind,
        table.place,
        table.cell,
        how_of(table),
        np.array([_cells(schedule)]),
        np.empty(len(schedule), dtype=np.int32),
    ]
    return run(_number, columns, results=[5], size=len(schedule))[0]


def _number(kind: Any, place: Any, cell: Any, how: Any, cells: Any, row: Any) -> None:
    for op in range(len(kind)):
        row[op] = (kind[op] * HOWS + how[place[op]]) * cells[0] + cell[op]


HERE = ((Block.KEPT, Block.KEPT_BACK), (Block.STASH, Block.STASH_BACK))
"""Activations and weight stashes on the device of their ops."""

AWAY = ((Block.KEPT_AWAY,), (Block.STASH_AWAY,))
"""Their copies elsewhere."""


def _changes(
    touch: Touch, numbers: NDArray[np.int64], where: tuple[tuple[Block, ...], ...]
) -> NDArray[np.int64]:
    """What comes or goes with an op, at (kind × HOWS + how) × cells + its stage's."""
    how = np.arange(len(Kind) * HOWS) % HOWS
    column = (how & AGAIN > 0) + 2 * (how & SPLIT > 0)
    changes = np.zeros((len(how), numbers.size // 8), dtype=np.int64)
    for blocks, each in zip(where, numbers.reshape(2, 4, -1)):
        for block in blocks:
            changes += touching(touch, block)[:, None] * each[column]
    return changes.ravel()


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


def _with_copies(
    program: Program,
    numbers: NDArray[np.int64],
    start: NDArray[Any],
    end: NDArray[Any],
) -> NDArray[np.int64]:
    """The peak of each device; -1 where a stream's events are not in order.

    A queue for each stream has what its instructions change on its own device, and
    one behind those of all streams what its copies change on the device they go to.
    """
    schedule, streams = program.schedule, program.streams
    homes = [stream.device for stream in streams]
    targets = schedule.offload_to
    targets_of = [targets[device] for device in homes]
    device_of = [*homes, *(-1 if to is None else to for to in targets_of)]
    moving = np.flatnonzero(
        (program.action == Action.COMPUTE) | (program.action == Action.COPY)
    )
    changes = [
        _changes(touch, numbers, where)
        for where in (HERE, AWAY)
        for touch in (Touch.WRITE, Touch.TAKE)
    ]
    ops = [moving, program.first_op, program.op_count, program.stream]
    columns = [*ops, _rows(schedule), *changes, np.zeros(len(device_of), np.int64)]
    (sizes,) = run(_count, columns, results=[9], size=len(moving))
    at = np.cumsum([0, *sizes.tolist()])
    total = int(at[-1])
    events = [np.empty(total, dtype=np.int64) for _ in range(2)]
    columns[9:] = [at[:-1].copy(), start, end, np.empty(total, start.dtype), *events]
    time, moment, change = run(_queue, columns, results=[12, 13, 14], size=total)
    queues: list[list[int]] = [[] for _ in range(schedule.devices)]
    for queue, device in enumerate(device_of):
        if device >= 0 and sizes[queue]:
            queues[device].append(queue)
    merged: list[NDArray[Any]] = [
        np.cumsum([0, *map(len, queues)]),
        np.array([queue for some in queues for queue in some], dtype=np.int64),
        at[:-1].copy(),
        at[1:],
        time,
        moment,
        change,
        np.zeros(schedule.devices, dtype=np.int64),
    ]
    return run(_merge, merged, results=[7], size=total)[0]


def _count(
    moving: Any,
    first_op: Any,
    op_count: Any,
    stream: Any,
    row: Any,
    grows: Any,
    shrinks: Any,
    grows_away: Any,
    shrinks_away: Any,
    sizes: Any,
) -> None:
    away = len(sizes) // 2
    for i in moving:
        for op in range(first_op[i], first_op[i] + op_count[i]):
            at = row[op]
            sizes[stream[i]] += (grows[at] > 0) + (shrinks[at] > 0)
            sizes[away + stream[i]] += (grows_away[at] > 0) + (shrinks_away[at] > 0)


def _queue(
    moving: Any,
    first_op: Any,
    op_count: Any,
    stream: Any,
    row: Any,
    grows: Any,
    shrinks: Any,
    grows_away: Any,
    shrinks_away: Any,
    filled: Any,
    start: Any,
    end: Any,
    time: Any,
    moment: Any,
    change: Any,
) -> None:
    """Births at the start of each instruction, deaths at its end, stream by stream."""
    away = len(filled) // 2
    for i in moving:
        behind = first_op[i] + op_count[i]
        for deaths in range(2):
            for op in range(first_op[i], behind):
                for elsewhere in range(2):
                    if elsewhere:
                        grown, gone = grows_away[row[op]], shrinks_away[row[op]]
                    else:
                        grown, gone = grows[row[op]], shrinks[row[op]]
                    by = -gone if deaths else grown
                    if by == 0:
                        continue
                    queue = stream[i] + elsewhere * away
                    place = filled[queue]
                    filled[queue] = place + 1
                    time[place] = end[i] if deaths else start[i]
                    moment[place] = 2 * i + deaths
                    change[place] = by


def _merge(
    queues_at: Any,
    queues: Any,
    head: Any,
    behind: Any,
    time: Any,
    moment: Any,
    change: Any,
    peak: Any,
) -> None:
    """Always the earliest of the queues' first; of those, first in the program."""
    for device in range(len(peak)):
        live = 0
        while True:
            first = -1
            for place in range(queues_at[device], queues_at[device + 1]):
                queue = queues[place]
                at = head[queue]
                if at == behind[queue]:
                    continue
                if (
                    first < 0
                    or time[at] < time[head[first]]
                    or (time[at] == time[head[first]] and moment[at] < moment[head[first]])
                ):
                    first = queue
            if first < 0:
                break
            at = head[first]
            head[first] = at + 1
            if head[first] < behind[first] and time[at + 1] < time[at]:
                peak[device] = -1
                break
            live += change[at]
            peak[device] = max(peak[device], live)


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
