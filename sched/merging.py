"""The most activations alive at once, where copies move them beside the ops.

Events of one stream are in order of time; those of a device, and of the device that its
copies go to, are merged from its streams, without sorting.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.changes import AWAY, HERE, changes, rows_of
from pipeproof.sched.instructions import Action, StreamKind
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import run
from pipeproof.sched.program import Program
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
    copies = np.flatnonzero(program.action == Action.COPY)
    (moving,) = new_columns((len(program.computes) + len(copies), np.int64))
    np.concatenate([program.computes, copies], out=moving)
    # At most a birth and a death of each op, and of each copy also elsewhere.
    here = np.zeros(len(streams), dtype=np.int64)
    counted = [moving, program.stream, program.op_count, here]
    (here,) = run(_count, counted, results=[3], size=len(moving))
    copying = [stream.kind != StreamKind.COMPUTE for stream in streams]
    at = np.concatenate([[0], np.cumsum([here, np.where(copying, here, 0)])])
    total = int(at[-1])
    number, weight = (
        np.int32 if most < 2**31 else np.int64
        for most in (2 * len(program), int(numbers.max(initial=0)))
    )
    by_op = [
        sign * changes(touch, numbers, where)
        for sign, touch in ((1, Touch.WRITE), (-1, Touch.TAKE))
        for where in (HERE, AWAY)
    ]
    columns: list[NDArray[Any]] = [
        moving,
        program.first_op,
        program.op_count,
        program.stream,
        rows_of(schedule),
        np.stack(by_op, axis=1).ravel(),
        start,
        end,
        at[:-1].copy(),
        *new_columns((total, start.dtype), (total, number), (total, weight)),
    ]
    ends, *events = run(_queue, columns, results=[8, 9, 10, 11], size=total)
    queues: list[list[int]] = [[] for _ in range(schedule.devices)]
    devices = (s.device for s in streams), (s.peer for s in streams)
    for queue, device in enumerate(chain(*devices)):
        if device is not None and at[queue] < ends[queue]:
            queues[device].append(queue)
    merged: list[NDArray[Any]] = [
        np.cumsum([0, *map(len, queues)]),
        np.array([queue for some in queues for queue in some], dtype=np.int64),
        at[:-1],
        ends,
        *events,
        np.zeros(schedule.devices, dtype=np.int64),
    ]
    return run(_merge, merged, results=[7], size=total)[0]


def _count(moving: Any, stream: Any, op_count: Any, events: Any) -> None:
    for i in moving:
        events[stream[i]] += 2 * op_count[i]


def _queue(
    moving: Any,
    first_op: Any,
    op_count: Any,
    stream: Any,
    row: Any,
    changes_of: Any,
    start: Any,
    end: Any,
    filled: Any,
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
                    by = changes_of[4 * row[op] + 2 * deaths + elsewhere]
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
