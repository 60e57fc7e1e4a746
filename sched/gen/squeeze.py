"""A building block becomes a schedule: stamped, squeezed, W filled in.

The block holds the starts of a micro-batch's F and I on every device; stamped once
for each micro-batch, an interval apart, it is a timetable that works already, for
any number of micro-batches. Squeezing only ever moves an op ahead, so the step is
never longer than the stamped one, and its idle time is bounded by the block alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeproof.sched.ir import F, I, Ops, Schedule, W
from pipeproof.sched.placement import Placement

F0, F1, I1, I0, WEIGHT = range(5)
"""Parts of a row: chunk 0 is the way down the devices, chunk 1 the way up."""

DOWN, UP = (F0, I1), (F1, I0)
"""Parts that wait for the device above, and for the one below."""

Row = list[list[int]]
"""Starts of a device's F0, F1, I1 and I0, each by micro-batch; of all its W, if any."""


@dataclass(frozen=True, slots=True)
class Block:
    """The timetable of one micro-batch, to be stamped for all.

    Attributes:
        starts: for each device, those of its F0, F1, I1 and I0.
        interval: from one micro-batch to the next.
        times: of F, I and W of a chunk, as are all numbers here.
    """

    starts: tuple[tuple[int, ...], ...]
    interval: int
    times: tuple[int, int, int]

    def stamped(self, micro_batches: int) -> Timetable:
        """One block for each micro-batch, W in the gaps."""
        stamps = range(0, self.interval * micro_batches, self.interval)
        rows = [[[at + by for by in stamps] for at in row] for row in self.starts]
        return Timetable(rows, self.times).filled()


class Timetable:
    """When every op starts, and how long each takes.

    Attributes:
        rows: one for each device.
        lengths: of an op of each part.
    """

    def __init__(self, rows: list[Row], times: tuple[int, int, int]) -> None:
        forward, input_grad, weight_grad = times
        self.rows = rows
        self.times = times
        self.lengths = (forward, forward, input_grad, input_grad, weight_grad)

    @property
    def peak(self) -> int:
        """The most chunks of activations alive on a device, each from F to W."""
        return max(map(self._most_alive, self.rows))

    @property
    def end(self) -> int:
        """When the last op ends."""
        lengths = self.lengths
        return max(part[-1] + n for row in self.rows for part, n in zip(row, lengths))

    def filled(self) -> Timetable:
        """With W in the gaps between the others, and nowhere else."""
        return Timetable([[*row[:4], self._gaps(row)] for row in self.rows], self.times)

    def squeezed(self, cap: int) -> Timetable:
        """What is outside the steady state moved ahead, at most `cap` chunks alive."""
        first = Timetable([list(map(list, row)) for row in self.rows], self.times)
        first._squeeze(cap)
        second = first.closed_up(self.times)
        second.rows = [row[:4] for row in second.rows]
        second._squeeze(cap)
        return second.filled()

    def closed_up(self, times: tuple[int, int, int]) -> Timetable:
        """The same order on each device at these times, every op as early as it can."""
        result = Timetable([list(map(list, row)) for row in self.rows], times)
        free = [0] * len(self.rows)
        backs: list[list[int]] = [[] for _ in self.rows]
        for _, d, part, i in self._in_order():
            start = max(free[d], result._ready(d, part, i, backs[d]))
            result.rows[d][part][i] = start
            free[d] = start + result.lengths[part]
            if part in (I1, I0):
                backs[d].append(start)
        return result

    def schedule(self, name: str) -> Schedule:
        """The order of the ops, on a V."""
        p = len(self.rows)
        rows = [[_listed(row, d, 2 * p - 1 - d)] for d, row in enumerate(self.rows)]
        return Schedule.of(rows, name=name, placement=Placement.v(p))

    def _gaps(self, row: Row) -> list[int]:
        """Starts of a device's W: each in the first gap behind the next I."""
        length = self.lengths[WEIGHT]
        busy = sorted(
            (start, start + n)
            for part, n in zip(row[:4], self.lengths)
            for start in part
        )
        result: list[int] = []
        ahead = free = 0
        for back in sorted(row[I1] + row[I0]):
            free = max(free, back + self.lengths[I0])
            while ahead < len(busy) and busy[ahead][0] < free + length:
                free = max(free, busy[ahead][1])
                ahead += 1
            result.append(free)
            free += length
        return result

    def _most_alive(self, row: Row) -> int:
        weights = sorted(row[WEIGHT]) if len(row) > WEIGHT else self._gaps(row)
        ends = [start + self.lengths[WEIGHT] for start in weights]
        forwards = enumerate(sorted(row[F0] + row[F1]), 1)
        return max(count - bisect_right(ends, start) for count, start in forwards)

    def _in_order(self) -> list[tuple[int, int, int, int]]:
        """(start, device, part, number) of everything, by start."""
        return sorted(
            (start, d, part, i)
            for d, row in enumerate(self.rows)
            for part, starts in enumerate(row)
            for i, start in enumerate(starts)
        )

    def _ready(self, d: int, part: int, i: int, backs: Sequence[int]) -> int:
        """When all that an op needs is done; `backs`: the starts of I, in order."""
        row, length = self.rows[d], self.lengths[part]
        result = 0
        if part in DOWN and d > 0:
            result = self.rows[d - 1][part][i] + length
        if part in UP and d + 1 < len(self.rows):
            result = self.rows[d + 1][part][i] + length
        if F0 < part < WEIGHT:
            result = max(result, row[part - 1][i] + self.lengths[part - 1])
        if part == WEIGHT:
            result = backs[i] + self.lengths[I0]
        if i > 0:
            result = max(result, row[part][i - 1] + length)
        return result

    def _squeeze(self, cap: int) -> None:
        """Move what is outside the steady state ahead, within the cap on memory.

        Where W have starts of their own, they move like the others, before and
        behind the steady state; where they just fill gaps, only what is behind it.
        """
        ops = self._in_order()
        top = self.rows[0]
        first_back = ops.index((top[I0][0], 0, I0, 0))
        last = len(top[F0]) - 1
        last_forward = ops.index((top[F0][last], 0, F0, last))
        begin = first_back if len(top) > WEIGHT else 0
        steady = range(begin, max(first_back, last_forward) + 1)
        taken: list[list[tuple[int, int]]] = [[] for _ in self.rows]
        backs: list[list[int]] = [[] for _ in self.rows]
        for place, (start, d, part, i) in enumerate(ops):
            if place not in steady:
                ready = self._ready(d, part, i, backs[d])
                free = list(self._free(d, part, range(ready, start), taken[d]))
                start = self._earliest(d, part, i, [*free, start], cap)
            self.rows[d][part][i] = start
            insort(taken[d], (start, start + self.lengths[part]))
            if part in (I1, I0):
                insort(backs[d], start)

    def _free(
        self, d: int, part: int, within: range, taken: Sequence[tuple[int, int]]
    ) -> Iterator[int]:
        """Starts worth a try: when an op before it ends, its time being free."""
        row, length = self.rows[d], self.lengths[part]
        before = max(bisect_left(taken, (within.start,)) - 1, 0)
        marks = {within.start, *(end for _, end in taken[before:])}
        if part in (F0, F1) and len(row) <= WEIGHT:  # may wait for a W in a gap
            marks.update(start + self.lengths[WEIGHT] for start in self._gaps(row))
        for start in sorted(mark for mark in marks if mark in within):
            at = bisect_left(taken, (start,))
            behind = at == 0 or taken[at - 1][1] <= start
            if behind and (at == len(taken) or start + length <= taken[at][0]):
                yield start

    def _earliest(
        self, d: int, part: int, i: int, starts: Sequence[int], cap: int
    ) -> int:
        """The first of these that keeps the cap; the last one does."""
        row = self.rows[d]
        if len(row) > WEIGHT and part not in (F0, F1):
            return starts[0]  # I brings nothing, W lets go

        def keeps(start: int) -> bool:
            row[part][i] = start
            if part not in (F0, F1) and start >= max(row[F0][-1], row[F1][-1]):
                return True  # moves no W that an F may wait for
            return self._most_alive(row) <= cap

        return starts[min(bisect_left(starts[:-1], True, key=keeps), len(starts) - 1)]


def _listed(row: Row, down: int, up: int) -> Ops:
    """A device's ops in order of their starts, each W that of the next I."""
    every = range(len(row[F0]))
    backs = np.array(sorted(range(2 * len(every)), key=(row[I1] + row[I0]).__getitem__))
    weights = Ops.of([W(up, every), W(down, every)]).take(backs)
    moves = Ops.of([F(down, every), F(up, every), I(up, every), I(down, every)])
    starts = [start for part in row for start in part]
    order = np.array(sorted(range(len(starts)), key=starts.__getitem__))
    return (moves + weights).take(order)
