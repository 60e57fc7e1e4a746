"""The most activations alive at once, where copies move them beside the ops.

Events of one stream are in order of time; those of a device, and of the device that its
copies go to, are merged from its streams, without sorting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.changes import AWAY, HERE, changes, rows_of
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import run
from pipeproof.sched.program import Action, Program
from pipeproof.sched.touches import Touch


def peaks_with_copies(
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
    by_op = [
        changes(touch, numbers, where)
        for where in (HERE, AWAY)
        for touch in (Touch.WRITE, Touch.TAKE)
    ]
    columns: list[NDArray[Any]] = [
        moving,
        program.first_op,
        program.op_count,
        program.stream,
        rows_of(schedule),
        *by_op,
    ]
    sizes = np.zeros(len(device_of), dtype=np.int64)
    (sizes,) = run(_count, [*columns, sizes], results=[9], size=len(moving))
    at = np.cumsum([0, *sizes.tolist()])
    total = int(at[-1])
    events = new_columns((total, start.dtype), (total, np.int64), (total, np.int64))
    columns += [at[:-1].copy(), start, end, *events]
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
                    or (
                        time[at] == time[head[first]]
                        and moment[at] < moment[head[first]]
                    )
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
