"""What a trace says, each figure defined once. See `Trace` for the definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, plain
from pipeproof.sched.instructions import Action
from pipeproof.sched.kernels import run

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


def makespan(trace: Trace) -> Number:
    """See `Trace.makespan`."""
    times = trace.timetable
    return times.unit(times.end.max()) if len(times.end) else 0


def busy(trace: Trace) -> list[Number]:
    """See `Trace.busy`."""
    return [trace.timetable.unit(time) for time in _occupied(trace)[0].tolist()]


def spans(trace: Trace) -> list[Number]:
    """See `Trace.spans`."""
    _, first, last = _occupied(trace)
    return [trace.timetable.unit(time) for time in (last - first).tolist()]


def _occupied(trace: Trace) -> list[NDArray[Any]]:
    """For each device the time it computes, its first start and its last end."""
    program, times = trace.program, trace.timetable
    columns: list[NDArray[Any]] = [
        program.computes,
        program.stream,
        np.array([stream.device for stream in program.streams], dtype=np.int32),
        times.start,
        times.end,
        np.zeros(program.schedule.devices, dtype=np.int8),
        *(np.zeros(program.schedule.devices, dtype=times.end.dtype) for _ in range(3)),
    ]
    return run(_occupy, columns, results=[6, 7, 8], size=len(program.computes))


def _occupy(
    computes: Any,
    stream: Any,
    device: Any,
    start: Any,
    end: Any,
    any_yet: Any,
    busy: Any,
    first: Any,
    last: Any,
) -> None:
    for place in range(len(computes)):  # one by one, in order: floats add up alike
        i = computes[place]
        on = device[stream[i]]
        busy[on] += end[i] - start[i]
        if not any_yet[on] or start[i] < first[on]:
            first[on] = start[i]
        if not any_yet[on] or end[i] > last[on]:
            last[on] = end[i]
        any_yet[on] = 1


def link_bytes(trace: Trace) -> dict[tuple[int, int], Number]:
    """See `Trace.link_bytes`."""
    weight = trace.sizes.known_bytes()
    program = trace.program
    result: dict[tuple[int, int], Number] = {}
    moves = np.flatnonzero(np.isin(program.action, (Action.SEND, Action.COPY)))
    sent = np.isin(program.reads.owner, moves)
    for instruction, buffer in zip(
        program.reads.owner[sent].tolist(), program.reads.values[sent].tolist()
    ):
        pair = program.streams[program.stream[instruction]].link
        if pair is not None:  # a copy to the host crosses none
            result[pair] = plain(result.get(pair, 0) + weight[buffer])
    return result
