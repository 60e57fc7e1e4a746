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
        result.append(plain(trace.end[mine].max() - trace.start[mine].min()))
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
    moves = np.flatnonzero(np.isin(program.action, (Action.SEND, Action.COPY)))
    sent = np.isin(program.reads.owner, moves)
    for instruction, buffer in zip(
        program.reads.owner[sent].tolist(), program.reads.values[sent].tolist()
    ):
        pair = program.streams[program.stream[instruction]].link
        if pair is not None:  # a copy to the host crosses none
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
            f"{_show(self.end)}: {program.label(self.waiting)}"
        )
        if self.waits_for >= 0:
            return (
                f"{text} waits for {program.label(self.waits_for)} on device "
                f"{int(program.device[self.waits_for])}, which ends at "
                f"{_show(trace.end[self.waits_for])}"
            )
        for i in program.waits_for[self.waiting]:
            if trace.end[i] == self.end and program.action[i] == Action.COPY:
                return f"{text} waits for {program.label(i)} of its own device"
            if program.action[i] == Action.SEND:
                return f"{text} waits for a send of its own device"
        return f"{text} comes late, though all it needs is there"


def _show(time: Any) -> str:
    return f"{float(time):.6g}"


def gaps(trace: Trace, device: int) -> list[Gap]:
    """See `Trace.gaps`."""
    program = trace.program
    mine = program.by_stream[device]  # compute streams come first, by device
    mine = mine[program.action[mine] == Action.COMPUTE]
    causes = _Causes(trace)
    result = []
    free_at: Any = 0
    for index in mine.tolist():
        if trace.start[index] > free_at:
            start, end = plain(free_at), plain(trace.start[index])
            result.append(Gap(device, start, end, index, _elsewhere(causes, index)))
        free_at = trace.end[index]
    return result


def _elsewhere(causes: _Causes, index: int) -> int:
    """The op on another device that an op was waiting for, or -1."""
    program = causes.program
    cause = causes.of_start(index)
    if cause < 0:
        return -1
    if program.action[cause] == Action.RECV:
        send = int(program.send_of[program.message[cause]])
        return program.waits_for[send][0]
    return cause if program.device[cause] != program.device[index] else -1


def critical_path(trace: Trace) -> list[int]:
    """See `Trace.critical_path`."""
    if not len(trace.program):
        return []
    causes = _Causes(trace)
    index = int(np.argmax(trace.end))
    path = []
    while index >= 0:
        path.append(index)
        index = causes.of_end(index)
    return path[::-1]


class _Causes:
    """Why an instruction started, or a receive ended, no earlier than it did."""

    def __init__(self, trace: Trace) -> None:
        self.program = program = trace.program
        self._start, self._end = trace.start, trace.end
        self._before = np.full(len(program), -1, dtype=np.int64)
        for members in program.by_stream:
            self._before[members[1:]] = members[:-1]

    def of_end(self, index: int) -> int:
        """The instruction that held up the end of another one; -1 for none."""
        if self.program.action[index] == Action.RECV:
            cause = self.of_start(index)
            if cause < 0 or self._end[index] > self._start[index]:
                return int(self.program.send_of[self.program.message[index]])
            return cause
        return self.of_start(index)

    def of_start(self, index: int) -> int:
        """The instruction that held up the start of another one; -1 for none."""
        needed = self._needed(index)
        cause = max(needed, key=lambda other: (self._end[other], other), default=-1)
        held_up = self._start[index] > (self._end[cause] if cause >= 0 else 0)
        if held_up and (other := self._held_up_by(index)) >= 0:
            return other
        return cause

    def _needed(self, index: int) -> list[int]:
        """What the program itself makes it wait for."""
        needed = self.program.waits_for[index]
        if self._before[index] >= 0:
            needed.append(int(self._before[index]))
        return needed

    def _held_up_by(self, index: int) -> int:
        """What only the transport or a shared processor makes it wait for."""
        program, now = self.program, self._start[index]
        if program.action[index] == Action.COMPUTE:
            before = int(np.searchsorted(program.computes, index)) - 1
            other = int(program.computes[before]) if before >= 0 else -1
            return other if other >= 0 and self._end[other] == now else -1
        if program.action[index] != Action.SEND:
            return -1
        # A rendezvous waits for what its receive waits for; a buffer of k, for an
        # earlier receive of the same link.
        recv = int(program.recv_of[program.message[index]])
        for other in self._needed(recv):
            if self._end[other] == now:
                return other
        earlier = int(self._before[recv])
        while earlier >= 0 and self._end[earlier] > now:
            earlier = int(self._before[earlier])
        return earlier if earlier >= 0 and self._end[earlier] == now else -1
