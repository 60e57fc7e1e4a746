"""What a trace says, each figure defined once. See `Trace` for the definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, plain
from pipeproof.sched.program import Action

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


def makespan(trace: Trace) -> Number:
    """See `Trace.makespan`."""
    times = trace.timetable
    return times.unit(times.end.max()) if len(times.end) else 0


def busy(trace: Trace) -> list[Number]:
    """See `Trace.busy`."""
    computes, times = trace.program.computes, trace.timetable
    duration = times.end[computes] - times.start[computes]
    total = np.zeros(trace.program.schedule.devices, dtype=duration.dtype)
    np.add.at(total, trace.program.device[computes], duration)  # one by one, in order
    return [times.unit(time) for time in total.tolist()]


def spans(trace: Trace) -> list[Number]:
    """See `Trace.spans`."""
    computes, times = trace.program.computes, trace.timetable
    result: list[Number] = []
    for where in _by_device(trace, computes):
        mine = computes[where]
        if not len(mine):
            result.append(0)
            continue
        result.append(times.unit(times.end[mine].max() - times.start[mine].min()))
    return result


def _by_device(trace: Trace, instructions: NDArray[Any]) -> list[NDArray[Any]]:
    """Positions in `instructions` of each device's, in order."""
    device = trace.program.device[instructions]
    devices = trace.program.schedule.devices
    # numpy sorts numbers of up to 16 bits by radix, ten times as fast.
    order = np.argsort(device.astype(np.min_scalar_type(devices)), kind="stable")
    counts = np.bincount(device, minlength=devices)
    return list(np.split(order, np.cumsum(counts)[:-1]))


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
