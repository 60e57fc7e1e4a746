"""Which op of a device is the last one over before an instruction starts.

An instruction starts behind the one before it on its stream and behind what it waits
for, and a receive ends behind its send. Most of that is of its own device, of which
all is known by then. What leads to another device is followed back, but only to what
comes, in the program's order, behind an op newer than the ones known to be over::

    device 0 | F0 F1 .. .. B0 F2     F2 is received where B0 gives a slot back, so
    device 1 | .. F0 B0 .. F1          behind that; behind F1 too? Its send and F2 on
                                       device 0 might be, but B0 there is before F1

In a schedule's steady state that is a handful of instructions. Where it is more, what
a search has looked at holds nothing newer than what it found: later ones stop there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action
from pipeproof.sched.kernels import distinct, run
from pipeproof.sched.lists import Column, Lists
from pipeproof.sched.program import Program

Index = NDArray[np.int64]


@dataclass(frozen=True)
class LastOps:
    """The k-th op of a device is 2k + 1, and 0 none.

    Attributes:
        program: whose.
        in_order: whether a receive waits for those before it on its stream.
    """

    program: Program
    in_order: bool

    def before(self, instructions: Index, devices: Index) -> Index:
        """Of each of these devices, the last one over before the instruction starts."""
        return self._of(instructions, devices, end=False)

    def at_end(self, instructions: Index, devices: Index) -> Index:
        """Likewise before it ends: of its own device, itself where it is one."""
        return self._of(instructions, devices, end=True)

    @cached_property
    def number(self) -> Column:
        """Of each instruction, which op of its device it is; 0 for others."""
        computes, first = self._computes
        result = np.zeros(len(self.program), dtype=np.int32)
        place = np.arange(len(computes)) - first[self.program.device[computes]]
        result[computes] = 2 * place + 1
        return result

    def _of(self, instructions: Index, devices: Index, *, end: bool) -> Index:
        result = self._own[end][instructions].astype(np.int64)
        device = self.program.device[instructions].astype(np.int64)
        away = np.flatnonzero(device != devices)
        pairs = device[away] * self.program.schedule.devices + devices[away]
        for pair in distinct(pairs).tolist():
            these = away[pairs == pair]
            found = self._of_another(*divmod(pair, self.program.schedule.devices))
            result[these] = found[end][instructions[these]]
        return result

    @cached_property
    def _own(self) -> tuple[Column, Column]:
        """Before each instruction starts, and ends, the last op of its own device."""
        device = self.program.device
        order = np.argsort(device, kind="stable")
        return self._searched(order, device[order], np.zeros_like(device))

    def _of_another(self, device: int, other: int) -> tuple[Column, Column]:
        """Likewise of another device, at the instructions of a device."""
        these = np.flatnonzero(self.program.device == device)
        return self._searched(these, np.full(len(these), other), self._own[1].copy())

    def _searched(
        self, these: Index, asked: NDArray[Any], ended: Column
    ) -> tuple[Column, Column]:
        computes, first = self._computes
        behind, joins = self._behind
        columns = [
            behind.offsets,
            behind.values,
            joins,
            self.number,
            self.program.device,
            computes,
            first,
            these,
            asked,
            np.zeros(len(self.program), dtype=np.int32),
            ended,
            np.full(len(self.program), -1, dtype=np.int32),
            np.empty(len(behind.values) + 1, dtype=np.int32),
        ]
        size = len(these) + len(behind.values)
        started, ended = run(_search, columns, results=[9, 10], size=size)
        return started, ended

    @cached_property
    def _computes(self) -> tuple[Index, Index]:
        """The compute instructions by device, and where those of each begin."""
        computes = self.program.computes
        device = self.program.device[computes]
        first = np.zeros(self.program.schedule.devices + 1, dtype=np.int64)
        np.cumsum(np.bincount(device, minlength=len(first) - 1), out=first[1:])
        return computes[np.argsort(device, kind="stable")], first

    @cached_property
    def _behind(self) -> tuple[Lists, NDArray[np.int8]]:
        """What each instruction is behind: on its stream, what it waits for, its send.

        And whether there is a send, behind which it ends and need not start.
        """
        program, waits = self.program, self.program.waits_for
        receives = program.action == Action.RECV
        order = np.argsort(program.stream, kind="stable")
        same = np.diff(program.stream[order]) == 0
        before = np.full(len(program), -1, dtype=np.int32)
        before[order[1:][same]] = order[:-1][same]
        joins = np.zeros(len(program), dtype=np.int8)
        if self.in_order:
            joins[program.recv_of] = 1
        else:
            before[receives] = -1
        follows = before >= 0
        offsets = np.zeros(len(program) + 1, dtype=waits.offsets.dtype)
        np.cumsum(follows + np.diff(waits.offsets) + joins, out=offsets[1:])
        values = np.empty(offsets[-1], dtype=np.int32)
        values[offsets[:-1][follows]] = before[follows]
        shift = offsets[:-1] + follows - waits.offsets[:-1]
        values[np.arange(len(waits.values)) + shift[waits.owner]] = waits.values
        if self.in_order:
            values[offsets[program.recv_of + 1] - 1] = program.send_of
        return Lists(offsets, values), joins


def _search(
    offsets: Any,
    behind: Any,
    joins: Any,
    number: Any,
    device: Any,
    computes: Any,
    first: Any,
    these: Any,
    asked: Any,
    started: Any,
    ended: Any,
    bound: Any,
    queue: Any,
) -> None:
    """Each of these instructions in turn, those of a device in the program's order.

    `ended` is known of the device asked, and filled in for the others. `bound` is, of
    what was looked at, the last op of the device asked that it can be behind at most,
    counted from twice `first` of that device; so those of all devices differ. `queue`
    begins with what a search has looked at, and ends with what it still has to.
    """
    for place in range(len(these)):
        index, other = these[place], asked[place]
        own, base = device[index], 2 * first[other]
        high = offsets[index + 1]
        best, newer = 0, -1
        for edge in range(offsets[index], high):
            if edge == high - joins[index]:
                started[index] = best
            queue[0] = behind[edge]
            head, filled, seen = 0, 1, 0
            while head < filled:
                node = queue[head]
                head += 1
                if newer < 0:  # the first instruction that may know of more
                    following = first[other] + (best + 1) // 2
                    newer = len(device)
                    if following < first[other + 1]:
                        newer = computes[following]
                if node < newer:
                    continue
                if device[node] == own or device[node] == other:
                    if ended[node] > best:
                        best, newer = ended[node], -1
                    continue
                if base <= bound[node] <= base + best:
                    continue
                bound[node] = base + best
                queue[seen] = node
                seen += 1
                for further in range(offsets[node], offsets[node + 1]):
                    queue[filled] = behind[further]
                    filled += 1
            for looked_at in range(seen):
                bound[queue[looked_at]] = base + best
        if joins[index] == 0:
            started[index] = best
        ended[index] = best
        if own == other and number[index] > 0:
            ended[index] = number[index]
