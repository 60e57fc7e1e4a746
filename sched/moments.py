"""When a device may have what the instructions of a program write and free."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.memory import lifetimes
from pipeproof.sched.program import Program

Index = NDArray[np.int64]

BLOCK = 1 << 24
"""Instructions times devices that are looked at together."""


class Moments:
    """In the order of each device's ops, links being free.

    Moment 2k + 1 is while the k-th compute instruction of its row runs, 2k + 2 until
    the next one does, and 0 before the first.

    Args:
        program: whose.
        in_order: whether a receive waits for those before it on its stream.
        more_skips: whether what is sent may be sent behind a LOCAL of its op that the
            program does not have.

    Attributes:
        count: of each device, how many there are.
    """

    def __init__(self, program: Program, *, in_order: bool, more_skips: bool) -> None:
        self._program, self._in_order = program, in_order
        self._more_skips = more_skips
        computes = np.flatnonzero(program.action == Action.COMPUTE)
        device = program.device[computes]
        self.count = 2 * np.bincount(device, minlength=program.schedule.devices) + 1
        order = np.argsort(device, kind="stable")
        starts = np.cumsum(self.count // 2) - self.count // 2
        number = np.empty(len(computes), dtype=np.int64)
        number[order] = np.arange(len(order)) - np.repeat(starts, self.count // 2)
        self._at = np.zeros(len(program), dtype=np.int64)
        self._at[computes] = 2 * number + 1
        self._computes = program.action == Action.COMPUTE

    @cached_property
    def of_buffers(self) -> tuple[Index, Index]:
        """The first moment at which each can be there, and the first when it is not.

        Of what one device parks in another's memory, of the one that does.
        """
        program = self._program
        born, died = lifetimes(program)
        device = np.where(self.parked, program.device[born], program.buffers[:, 1])
        first = np.zeros(len(born), dtype=np.int64)
        behind = np.full(len(born), np.iinfo(np.int64).max)
        own_birth, own_death = self._computes[born], self._computes[died] & (died >= 0)
        first[own_birth] = self._at[born[own_birth]]
        behind[own_death] = self._at[died[own_death]] + 1
        local = self._first_local(born)
        births = np.flatnonzero(~own_birth)
        deaths = np.flatnonzero(~own_death & (died >= 0))
        for some, started, ended in self._known():
            mine = births[(device[births] >= some.start) & (device[births] < some.stop)]
            seen = started[born[mine], device[mine] - some.start]
            first[mine] = np.where(seen > 0, seen + 1, 0)
            mine = deaths[(device[deaths] >= some.start) & (device[deaths] < some.stop)]
            at = ended[died[mine], device[mine] - some.start] + 1
            later = died[mine] >= local[born[mine]]
            behind[mine] = at + (self._more_skips | later | self.parked[mine])
        return first, behind

    @property
    def parked(self) -> NDArray[np.bool_]:
        """Of each buffer, whether it is one device's in another's memory."""
        found: NDArray[np.bool_] = self._program.buffers[:, 0] == BufferKind.OFFLOADED
        return found

    def meanwhile(self, device: int, other: int) -> tuple[Index, Index]:
        """At each moment of a device, the first and last at which another one can be.

        What it is behind has begun only when that was over, and what waits for it is
        yet to begin.
        """
        ours, theirs = (
            np.flatnonzero(self._computes & (self._program.device == one))
            for one in (device, other)
        )
        seen = self._started_before(other)[ours]
        first = np.where(seen > 0, seen + 1, 0)
        first = np.concatenate([[0], np.repeat(first, 2)])
        waiting = self._started_before(device)[theirs]
        moments = np.arange(self.count[device])
        following = np.searchsorted(waiting, moments + (moments % 2 == 0))
        return first, 2 * following  # the gap before that op

    @property
    def at_the_latest(self) -> Index:
        """When each must be there: what is received, when an op first reads it."""
        program, (first, behind) = self._program, self.of_buffers
        born, _ = lifetimes(program)
        received = program.action[born] == Action.RECV
        first = np.where(received, self._at[self._reader], first)
        return np.where(self.parked, behind, first)

    @cached_property
    def _reader(self) -> Index:
        """Of each buffer, the first instruction that reads it; -1 for none."""
        reads = self._program.reads
        reader = np.full(len(self._program.buffers), -1, dtype=np.int64)
        reader[reads.values[::-1]] = reads.owner[::-1]
        return reader

    def _first_local(self, born: Index) -> Index:
        """Of each op the first LOCAL that hands something of it over.

        Until then all of it is there, with what the LOCAL makes of it; a SEND behind
        that comes later, though in no time.
        """
        program, reads = self._program, self._program.reads
        result = np.full(len(program), len(program))
        local = np.flatnonzero(program.action[reads.owner] == Action.LOCAL)
        np.minimum.at(result, born[reads.values[local]], reads.owner[local])
        return result

    def taken(self, buffers: Index, first: Index) -> Index:
        """When a forward takes up what is in these; what it made itself, at once."""
        program = self._program
        born, _ = lifetimes(program)
        own = self._computes[born[buffers]]
        return np.where(own, first, self._at[self._reader[buffers]])

    def _known(self) -> Iterator[tuple[slice, Index, Index]]:
        """For some devices at a time, [instruction, device]: its last op before.

        Before what it takes part in starts, and before it ends; 0 for none.
        """
        devices = self._program.schedule.devices
        width = max(1, BLOCK // len(self._program))
        if devices <= width:
            yield slice(0, devices), *self._of_all
            return
        for begin in range(0, devices, width):
            some = slice(begin, min(begin + width, devices))
            yield some, *self._of_some(some)

    def _started_before(self, device: int) -> Index:
        """Of each instruction, the device's last op before it starts."""
        if self._program.schedule.devices * len(self._program) <= BLOCK:
            return self._of_all[0][:, device]
        return self._of_some(slice(device, device + 1))[0][:, 0]

    @cached_property
    def _of_all(self) -> tuple[Index, Index]:
        return self._of_some(slice(0, self._program.schedule.devices))

    def _of_some(self, some: slice) -> tuple[Index, Index]:
        program = self._program
        size = len(program), some.stop - some.start
        started, ended = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        last = [-1] * len(program.streams)
        sender = np.full(len(program), -1, dtype=np.int64)
        sender[program.recv_of] = program.send_of
        columns = (
            program.stream.tolist(),
            sender.tolist(),
            program.waits_for.to_lists(),
            self._at.tolist(),
            program.device.tolist(),
        )
        for index, (stream, sent, waits, at, device) in enumerate(zip(*columns)):
            row = started[index]
            if last[stream] >= 0 and (sent < 0 or self._in_order):
                row[:] = ended[last[stream]]
            for before in waits:
                np.maximum(row, ended[before], out=row)
            last[stream] = index
            ended[index] = row
            if sent >= 0 and self._in_order:
                np.maximum(row, ended[sent], out=ended[index])
            if at and some.start <= device < some.stop:
                ended[index, device - some.start] = at
        return started, ended
