"""Why each instruction of a trace ended no earlier: the last condition it met.

An instruction starts when the last of its conditions is met: the one before it on
its stream is done, so is all that it waits for, and a send is admitted by the
transport. A receive ends when it is posted and its message is there. Looking back
from the last condition to the last condition of that one, and so on, cuts any
stretch of time into parts, each with the one instruction that ran in it and held
up everything behind::

    device 0 | 0F0 0F1 ........................ 0B0
                   └─ 1F0 ─ 1B0 ─ transfer ─ latency ┘

All of it is read off the times alone, so that it holds for predicted and for
measured ones. Where an instruction starts later than its last condition was met,
the time between is nobody's: it comes late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.exact import Number, column, plain
from pipeproof.sched.program import Action, StreamKind

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

Index = NDArray[np.int64]
Times = NDArray[Any]

SHARED_PROCESSOR = "all devices share one processor"
"""The note of a trace whose compute streams take turns."""


LATE = len(Action)
"""In place of an action: nothing ran, though it could have."""


class Why(IntEnum):
    """Which condition was the last."""

    NOTHING = 0
    """There was none."""
    STREAM = 1
    """The instruction before it on its stream."""
    PROCESSOR = 2
    """The op before it on a processor that devices share."""
    NEEDS = 3
    """One that the program makes it wait for."""
    MEETING = 4
    """Of a REDUCE: what another device of it waits for."""
    PARTNER = 5
    """Of a SEND: its receive was posted; the cause is what that waited for."""
    SLOT = 6
    """Of a SEND: an earlier receive of the link made room in its buffer."""
    TURN = 7
    """The one before it of another stream of its device, where these are one."""
    ARRIVAL = 8
    """Of a RECV: its message, whose SEND is the cause."""


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


class Causes:
    """The last condition of each instruction.

    Time and memory linear in the instructions.

    Attributes:
        trace: whose instructions.
        of: per instruction, the one whose end was its last condition; -1 for none.
        why: of `Why`, which condition that was.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._scale = scale_of(trace.start, trace.end)
        self._start, self._end = (
            scaled(times, self._scale) for times in (trace.start, trace.end)
        )
        size = len(trace.program)
        self.of = np.full(size, -1, dtype=np.int64)
        self.why = np.full(size, Why.NOTHING, dtype=np.int8)
        self._met = np.full(size, -1, dtype=self._end.dtype)
        self._previous_on_stream()
        self._needs()
        self._meetings()
        self._turns(Action.RECV, Action.COMPUTE, Action.LOCAL, Action.COPY)
        self._turns(Action.REDUCE)
        self._admissions()
        self._turns(Action.SEND)
        self._since = self._arrivals()

    def _offer(self, after: Index, before: Index, why: Why) -> None:
        """Note a condition of each of some instructions, if it was met last."""
        later = self._end[before] >= self._met[after]
        after, before = after[later], before[later]
        self.of[after], self.why[after] = before, why
        self._met[after] = self._end[before]

    def _previous_on_stream(self) -> None:
        program = self.trace.program
        for members in program.by_stream:
            self._offer(members[1:], members[:-1], Why.STREAM)
        if SHARED_PROCESSOR in self.trace.notes:
            devices = program.schedule.devices
            turns = np.flatnonzero(program.stream < devices)
            apart = program.stream[turns[1:]] != program.stream[turns[:-1]]
            self._offer(turns[1:][apart], turns[:-1][apart], Why.PROCESSOR)

    def _needs(self) -> None:
        waits = self.trace.program.waits_for
        there = np.flatnonzero(np.diff(waits.offsets))
        if not len(there):
            return
        ends = self._end[waits.values]
        latest = np.maximum.reduceat(ends, waits.offsets[there])
        # Of several that end last, the last one stands.
        last = np.empty(len(self.of), dtype=np.int64)
        binding = ends == np.repeat(latest, np.diff(waits.offsets)[there])
        last[waits.owner[binding]] = waits.values[binding]
        self._offer(there, last[there], Why.NEEDS)

    def _meetings(self) -> None:
        """A REDUCE starts on all its devices at once."""
        program = self.trace.program
        reducing = np.flatnonzero(program.action == Action.REDUCE)
        ops, first = program.schedule.ops, program.first_op[reducing]
        groups: dict[tuple[int, int], list[int]] = {}
        stages, steps = ops.stage[first].tolist(), ops.micro_batch[first].tolist()
        for index, key in zip(reducing.tolist(), zip(stages, steps)):
            groups.setdefault(key, []).append(index)
        for group in groups.values():
            last = max(group, key=lambda index: (self._met[index], index))
            others = np.array([i for i in group if self._met[i] < self._met[last]])
            if len(others):
                causes = np.full(len(others), self.of[last])
                self._offer(others.astype(np.int64), causes, Why.MEETING)

    def _turns(self, *actions: Action) -> None:
        """Streams of a device may be one: then they take turns.

        What starts late does so when an earlier one of its device ends.
        """
        program = self.trace.program
        late = np.flatnonzero(
            np.isin(program.action, actions) & (self._start > self._met)
        )
        if not len(late):
            return
        size = len(program)
        times, rank = np.unique(self._end, return_inverse=True)
        at = np.searchsorted(times, self._start[late])
        known = times[np.minimum(at, len(times) - 1)] == self._start[late]
        late, at = late[known], at[known]
        device = program.device.astype(np.int64)
        place = device * len(times) + rank
        order = np.lexsort((np.arange(size), place))
        wanted = device[late] * len(times) + at
        # Sorted by device, end and index: the last one of these before it.
        nearest = np.searchsorted(place[order] * size + order, wanted * size + late)
        before = order[np.maximum(nearest - 1, 0)]
        there = (nearest > 0) & (place[before] == wanted)
        self._offer(late[there], before[there], Why.TURN)

    def _admissions(self) -> None:
        """What only the transport makes a SEND wait for.

        A rendezvous waits for its receive to be posted; a buffer of k, for the
        receive k messages before to be done.
        """
        program = self.trace.program
        sends = np.flatnonzero(program.action == Action.SEND)
        sends = sends[self._start[sends] > self._met[sends]]
        recvs = program.recv_of[program.message[sends]].astype(np.int64)
        now = self._start[sends]
        posted = (self._start[recvs] == now) & (self._met[recvs] == now)
        self.of[sends[posted]] = self.of[recvs[posted]]
        self.why[sends[posted]] = Why.PARTNER
        self._met[sends[posted]] = now[posted]
        left, recvs, now = sends[~posted], recvs[~posted], now[~posted]
        for stream in np.unique(program.stream[recvs]).tolist():
            mine = program.stream[recvs] == stream
            link = program.by_stream[stream]
            ends = np.maximum.accumulate(self._end[link])
            place = np.searchsorted(ends, now[mine], side="right") - 1
            earlier = link[np.maximum(place, 0)]
            admits = (place >= 0) & (earlier < left[mine])
            admits &= self._end[earlier] == now[mine]
            self._offer(left[mine][admits], earlier[admits], Why.SLOT)

    def _arrivals(self) -> Times:
        """A RECV ends with its message, unless it was posted after that came."""
        program = self.trace.program
        since = self._start.copy()
        recvs = np.flatnonzero(program.action == Action.RECV)
        sends = program.send_of[program.message[recvs]].astype(np.int64)
        arrived = self._end[recvs] > self._start[recvs]
        arrived |= self._end[sends] >= self._start[recvs]
        recvs, sends = recvs[arrived], sends[arrived]
        self.of[recvs], self.why[recvs] = sends, Why.ARRIVAL
        self._met[recvs] = self._end[sends]
        since[recvs] = self._end[sends]
        return since

    def walk(self, first: Index, waiting: Index, upto: Times, down_to: Times) -> Parts:
        """Look back from instructions, and cut the time before into parts.

        Args:
            first: where each walk begins: an instruction, or -1 for none.
            waiting: what waits for it; late, if it ended long before.
            upto: to when the stretch of time goes that each walk cuts up.
            down_to: and from when.
        """
        low_end, high_end = (scaled(t, self._scale) for t in (down_to, upto))
        found: list[tuple[Any, ...]] = []
        walk = np.flatnonzero(high_end > low_end)
        cause, waiting, high = first[walk], waiting[walk], high_end[walk]
        while len(walk):
            low = low_end[walk]
            met, since = self._ran(cause, low, high)
            found.append((walk, waiting, True, met, high))
            found.append((walk, cause, False, since, met))
            more = (since > low) & (cause >= 0)
            walk, high, waiting = walk[more], since[more], cause[more]
            cause = self.of[waiting]
        return self._parts(found)

    def _ran(self, cause: Index, low: Times, high: Times) -> tuple[Times, Times]:
        """Until and from when these ran, within bounds; -1 never did."""
        met = np.where(cause >= 0, self._end[cause], low)
        met = np.maximum(np.minimum(met, high), low)
        since = np.where(cause >= 0, self._since[cause], low)
        return met, np.maximum(np.minimum(since, met), low)

    def _parts(self, found: list[tuple[Any, ...]]) -> Parts:
        kept = []
        for walk, instruction, late, start, end in found:
            long = (end > start).astype(np.bool_)
            lateness = np.full(int(long.sum()), late)
            parts = (walk[long], instruction[long], lateness, start[long], end[long])
            kept.append(parts)
        none = np.empty(0, dtype=np.int64)
        kept.append((none, none, none.astype(np.bool_), self._end[:0], self._end[:0]))
        of, instruction, late, start, end = map(np.concatenate, zip(*kept))
        order = np.argsort(of, kind="stable")
        start, end = (unscaled(times, self._scale) for times in (start, end))
        return Parts(
            self.trace, *(c[order] for c in (of, instruction, late, start, end))
        )

    @cached_property
    def critical(self) -> Parts:
        """From the end of the step back to its start."""
        back = np.array(self.path()[::-1], dtype=np.int64)
        if not len(back):
            return self._parts([])
        # As `walk` goes, but along one path whose instructions are known.
        zero = np.zeros_like(self._end[back])
        top = np.full_like(zero, self._end[back[0]])
        _, since = self._ran(back, zero, top)
        high = np.minimum.accumulate(np.concatenate([top[:1], since[:-1]]))
        met, since = self._ran(back, zero, high)
        waiting = np.concatenate([back[:1], back[:-1]])
        walk = np.zeros(len(back), dtype=np.int64)
        last, first = walk[:1], zero[:1]
        return self._parts(
            [
                (walk, waiting, True, met, high),
                (walk, back, False, since, met),
                (last, back[-1:], True, first, since[-1:]),
            ]
        )

    @property
    def last(self) -> int:
        """The instruction with which the step ends."""
        return int(np.argmax(self._end))

    def path(self) -> list[int]:
        """See `Trace.critical_path`."""
        path: list[int] = []
        of = self.of.tolist()
        index = self.last if of else -1
        while index >= 0:
            path.append(index)
            index = of[index]
        return path[::-1]


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
