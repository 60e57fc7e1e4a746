"""When a device may have what the instructions of a program write and free."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.last_ops import LastOps
from pipeproof.sched.lists import Column
from pipeproof.sched.memory import lifetimes
from pipeproof.sched.program import Program

Index = NDArray[np.int64]


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
        self._program, self._more_skips = program, more_skips
        self._last = LastOps(program, in_order)
        self._at = self._last.number
        self._computes = program.action == Action.COMPUTE
        device = program.device[program.computes]
        self.count = 2 * np.bincount(device, minlength=program.schedule.devices) + 1

    @cached_property
    def of_buffers(self) -> tuple[Column, Column]:
        """The first moment at which each can be there, and the first when it is not.

        Of what one device parks in another's memory, of the one that does.
        """
        program = self._program
        born, died = lifetimes(program)
        device = np.where(self.parked, program.device[born], program.buffers[:, 1])
        first = np.zeros(len(born), dtype=np.int32)
        behind = np.full(len(born), np.iinfo(np.int32).max, dtype=np.int32)
        own_birth, own_death = self._computes[born], self._computes[died] & (died >= 0)
        first[own_birth] = self._at[born[own_birth]]
        behind[own_death] = self._at[died[own_death]] + 1
        local = self._first_local(born)
        births = np.flatnonzero(~own_birth)
        deaths = np.flatnonzero(~own_death & (died >= 0))
        seen = self._last.before(born[births], device[births])
        first[births] = np.where(seen > 0, seen + 1, 0)
        at = self._last.at_end(died[deaths], device[deaths]) + 1
        later = died[deaths] >= local[born[deaths]]
        behind[deaths] = at + (self._more_skips | later | self.parked[deaths])
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
        seen = self._before(ours, other)
        first = np.where(seen > 0, seen + 1, 0)
        first = np.concatenate([[0], np.repeat(first, 2)])
        waiting = self._before(theirs, device)
        moments = np.arange(self.count[device])
        following = np.searchsorted(waiting, moments + (moments % 2 == 0))
        return first, 2 * following  # the gap before that op

    def _before(self, instructions: Index, device: int) -> Index:
        return self._last.before(instructions, np.full(len(instructions), device))

    @property
    def at_the_latest(self) -> Column:
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

    def taken(self, buffers: Index, first: Column) -> Column:
        """When a forward takes up what is in these; what it made itself, at once."""
        program = self._program
        born, _ = lifetimes(program)
        own = self._computes[born[buffers]]
        return np.where(own, first, self._at[self._reader[buffers]])
