"""What a trace says, each figure defined once. See `Trace` for the definitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, plain
from pipeproof.sched.program import Action

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace


def makespan(trace: Trace) -> Number:
    """See `Trace.makespan`."""
    return plain(max(trace.end.tolist(), default=0))


def busy(trace: Trace) -> list[Number]:
    """See `Trace.busy`."""
    computes = trace.program.computes
    duration = trace.end[computes] - trace.start[computes]
    return [
        plain(sum(duration[where].tolist())) for where in _by_device(trace, computes)
    ]


def spans(trace: Trace) -> list[Number]:
    """See `Trace.spans`."""
    computes = trace.program.computes
    result: list[Number] = []
    for where in _by_device(trace, computes):
        mine = computes[where]
        if not len(mine):
            result.append(0)
            continue
        result.append(plain(max(trace.end[mine]) - min(trace.start[mine])))
    return result


def _by_device(trace: Trace, instructions: NDArray[Any]) -> list[NDArray[Any]]:
    """Positions in `instructions` of each device's, in order."""
    device = trace.program.device[instructions]
    order = np.argsort(device, kind="stable")
    counts = np.bincount(device, minlength=trace.program.schedule.devices)
    return list(np.split(order, np.cumsum(counts)[:-1]))


def link_bytes(trace: Trace) -> dict[tuple[int, int], Number]:
    """See `Trace.link_bytes`."""
    weight = trace.sizes.known_bytes()
    program = trace.program
    result: dict[tuple[int, int], Number] = {}
    sends = np.flatnonzero(program.action == Action.SEND)
    sent = np.isin(program.reads.owner, sends)
    for instruction, buffer in zip(
        program.reads.owner[sent].tolist(), program.reads.values[sent].tolist()
    ):
        stream = program.streams[program.stream[instruction]]
        pair = stream.device, stream.peer if stream.peer is not None else -1
        result[pair] = plain(result.get(pair, 0) + weight[buffer])
    return result


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which a device idles between two of its ops.

    Attributes:
        device: which.
        start, end: in the trace's unit of time.
        waiting: the instruction that runs next.
        waits_for: the op elsewhere whose result arrives at `end`; -1 where the
            device waits for nothing but itself (a send that blocks it).
    """

    device: int
    start: Number
    end: Number
    waiting: int
    waits_for: int

    def explain(self, trace: Trace) -> str:
        """In words: what waits, for what, and until when."""
        program = trace.program
        text = (
            f"device {self.device} idles {_show(self.end - self.start)} until "
            f"{_show(self.end)}: {program.label(self.waiting)} waits"
        )
        if self.waits_for < 0:
            return f"{text} for a send of its own device"
        return (
            f"{text} for {program.label(self.waits_for)} on device "
            f"{int(program.device[self.waits_for])}, which ends at "
            f"{_show(trace.end[self.waits_for])}"
        )


def _show(time: Any) -> str:
    return f"{float(time):.6g}"


def gaps(trace: Trace, device: int) -> list[Gap]:
    """See `Trace.gaps`."""
    program = trace.program
    mine = program.by_stream[device]  # compute streams come first, by device
    mine = mine[program.action[mine] == Action.COMPUTE]
    result = []
    free_at: Any = 0
    for index in mine.tolist():
        if trace.start[index] > free_at:
            waits_for = _producer(trace, index)
            result.append(
                Gap(device, plain(free_at), plain(trace.start[index]), index, waits_for)
            )
        free_at = trace.end[index]
    return result


def _producer(trace: Trace, index: int) -> int:
    """The op whose message an instruction waited for longest."""
    program = trace.program
    waits = program.waits_for[index]
    if not waits:
        return -1
    last = max(waits, key=lambda other: trace.end[other])
    if program.action[last] != Action.RECV:
        return -1
    send = int(program.send_of[program.message[last]])
    return program.waits_for[send][0]


def critical_path(trace: Trace) -> list[int]:
    """See `Trace.critical_path`."""
    program = trace.program
    if not len(program):
        return []
    before = np.full(len(program), -1, dtype=np.int64)
    for members in program.by_stream:
        before[members[1:]] = members[:-1]
    index = int(np.argmax(trace.end))
    path = []
    while index >= 0:
        path.append(index)
        candidates = program.waits_for[index]
        if before[index] >= 0:
            candidates.append(int(before[index]))
        if program.action[index] == Action.RECV:
            candidates.append(int(program.send_of[program.message[index]]))
        index = max(candidates, key=lambda other: (trace.end[other], other), default=-1)
    return path[::-1]
