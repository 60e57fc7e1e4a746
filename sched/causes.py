"""Why each instruction of a trace ended no earlier: the last condition it met.

An instruction starts when the last of its conditions is met: the one before it on
its stream is done, so is all that it waits for, and a send is admitted by the
transport. A receive ends when it is posted and its message is there. Looking back
from the last condition to the last condition of that one, and so on, cuts any
stretch of time into parts, each with the one instruction that ran in it and held
up everything behind::

    device 0 | 0F0 0F1 ........................ 0B0
                   └─ 1F0 ─ 1B0 ─ transfer ─ latency ┘

All of it is read off the program and the times, so that it holds for predicted and
for measured ones. Of conditions met at the same time one is named. What only the
transport makes an instruction wait for is not in the program: it is inferred where
an instruction starts late, at the very time at which such a condition was met. Where
none was, the time between is nobody's: it comes late.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.groups import needs, turns_of_others
from pipeproof.sched.instructions import Action
from pipeproof.sched.lists import Lists
from pipeproof.sched.matching import meetings
from pipeproof.sched.parts import Index, Parts, Times, scale_of, scaled, unscaled

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

SHARED_PROCESSOR = "all devices share one processor"
"""The note of a trace whose compute streams take turns."""


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
    """Of a REDUCE or TIE: what another device of it waits for."""
    PARTNER = 5
    """Of a SEND: its receive was posted; the cause is what that waited for."""
    SLOT = 6
    """Of a SEND: an earlier receive of the link made room in its buffer."""
    TURN = 7
    """The one before it of another stream of its device, where these are one."""
    ARRIVAL = 8
    """Of a RECV: its message, whose SEND is the cause."""


class Causes:
    """The last condition of each instruction.

    Time and memory linear in the instructions.

    Args:
        trace: whose instructions.
        conditions: where they are known, the stream on which each takes its turn,
            and all that it waits for beside that and its message; nothing is then
            inferred from times.

    Attributes:
        trace: whose instructions.
        of: per instruction, the one whose end was its last condition; -1 for none.
        why: of `Why`, which condition that was.
    """

    def __init__(
        self, trace: Trace, conditions: tuple[NDArray[Any], Lists] | None = None
    ) -> None:
        self.trace = trace
        self._scale = scale_of(trace.start, trace.end)
        self._start, self._end = (
            scaled(times, self._scale) for times in (trace.start, trace.end)
        )
        size = len(trace.program)
        self.of = np.full(size, -1, dtype=np.int64)
        self.why = np.full(size, Why.NOTHING, dtype=np.int8)
        self._met = np.full(size, -1, dtype=self._end.dtype)
        if conditions is None:
            self._infer()
        else:
            turn, waits = conditions
            before = _previous(np.arange(size), turn)
            behind = np.flatnonzero(before >= 0)
            self._offer(behind, before[behind], Why.STREAM)
            self._needs(waits)
        self._since = self._arrivals()

    def _infer(self) -> None:
        self._previous_on_stream()
        self._needs(needs(self.trace.program))
        self._meetings()
        self._turns(Action.RECV, Action.COMPUTE, Action.LOCAL, Action.COPY)
        self._turns(Action.REDUCE, Action.TIE)
        self._admissions()
        self._turns(Action.SEND)

    def _offer(self, after: Index, before: Index, why: Why) -> None:
        """Note a condition of each of some instructions, if it was met last."""
        later = self._end[before] >= self._met[after]
        after, before = after[later], before[later]
        self.of[after], self.why[after] = before, why
        self._met[after] = self._end[before]

    def _previous_on_stream(self) -> None:
        program = self.trace.program
        before, after = turns_of_others(program)
        self._offer(after, before, Why.STREAM)
        if SHARED_PROCESSOR in self.trace.notes:
            devices = program.schedule.devices
            turns = np.flatnonzero(program.stream < devices)
            apart = program.stream[turns[1:]] != program.stream[turns[:-1]]
            self._offer(turns[1:][apart], turns[:-1][apart], Why.PROCESSOR)

    def _needs(self, waits: Lists) -> None:
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
        """A REDUCE, and a TIE, starts on all its devices at once."""
        for group in map(np.ndarray.tolist, meetings(self.trace.program)):
            last = max(group, key=lambda index: (self._met[index], index))
            others = np.array([i for i in group if self._met[i] < self._met[last]])
            if len(others):
                causes = np.full(len(others), self.of[last])
                self._offer(others.astype(np.int64), causes, Why.MEETING)

    def _turns(self, *actions: Action) -> None:
        """Streams of a device may be one: then they take turns, in this order.

        What starts late does so when the one before it in such a stream ends: of
        the sends and receives between two devices, of all of a device, or of
        everything on it.
        """
        program = self.trace.program
        late = np.flatnonzero(
            np.isin(program.action, actions) & (self._start > self._met)
        )
        if not len(late):
            return
        messages = np.flatnonzero(program.message >= 0)
        device = program.device.astype(np.int64)
        peers = [-1 if s.peer is None else s.peer for s in program.streams]
        peer = np.array(peers, dtype=np.int64)[program.stream]
        pair = device * program.schedule.devices + peer
        everything = np.arange(len(program))
        for members, key in (
            (messages, pair),
            (messages, device),
            (everything, device),
        ):
            before = _previous(members, key)[late]
            there = (before >= 0) & (self._end[before] == self._start[late])
            self._offer(late[there], before[there], Why.TURN)
            late = late[~there]

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


def _previous(members: Index, key: Index) -> Index:
    """For each of these instructions the one before with its key; else -1."""
    order = members[np.argsort(key[members], kind="stable")]
    alike = key[order[1:]] == key[order[:-1]]
    result = np.full(len(key), -1, dtype=np.int64)
    result[order[1:][alike]] = order[:-1][alike]
    return result
