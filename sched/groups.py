"""Messages posted as one: what follows for all that waits, or is waited for.

A group of one device (torch's `batch_isend_irecv`, NCCL's group calls) is a unit to
those around it::

    what any of them waits for  ──▶  start of all  ──▶  each transfer, as it may
                                                             │
    what waits for any of them  ◀──  end of all    ◀─────────┘

So its instructions start together, once each of them could, and what waits for one
waits for all. Each still has times of its own: under rendezvous a send starts once
its receive is posted, and ends when it is through. In a stream they take no turns,
also where a communication library has one stream for all of them: that is the point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import csr
from pipeproof.sched.lists import Lists
from pipeproof.sched.program import Program
from pipeproof.sched.streams import StreamModel, in_turn

Edges = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Pairs (before, after) of instructions."""


def turns_of_others(
    program: Program, model: StreamModel = "dir", *, shared_processor: bool = False
) -> Edges:
    """Which instruction follows which on its stream, where neither has a group."""
    before, after = _in_turn(program, model, shared_processor)
    if not len(program.groups):
        return before, after
    alone = (program.group[before] < 0) & (program.group[after] < 0)
    return before[alone], after[alone]


def needs(
    program: Program, model: StreamModel = "dir", *, shared_processor: bool = False
) -> Lists:
    """What each instruction waits for, beside turns of streams and its message.

    Without groups the program's `waits_for`. With them, also what the others of its
    group wait for, the rest of the group of each of these, and of streams what comes
    before and behind a group.

    Args:
        program: whose.
        model: which of a device's streams are one.
        shared_processor: whether the compute streams of all devices are one too.
    """
    if not len(program.groups):
        return program.waits_for
    group = program.group
    before, after = _in_turn(program, model, shared_processor)
    around = (group[before] >= 0) | (group[after] >= 0)
    around &= (group[before] != group[after]) | (group[before] < 0)
    waits = program.waits_for
    before, after = for_all(
        program,
        np.concatenate([before[around], waits.values]),
        np.concatenate([after[around], waits.owner]),
    )
    offsets, values = csr(len(program), after, before)
    return Lists(offsets, values.astype(np.int32))


def for_all(
    program: Program, before: NDArray[np.int64], after: NDArray[np.int64]
) -> Edges:
    """The same waits, between all of a group where there was one of it.

    A wait within a group becomes one for itself: such a group can never start.
    """
    for _ in range(2):  # of what is waited for, then of what waits
        which, members = _everyone(program, before)
        before, after = after[which], members
    return before, after


def _everyone(program: Program, some: NDArray[np.int64]) -> Edges:
    """The group of each instruction, or itself: places in `some`, and members."""
    if not len(program.groups):
        return np.arange(len(some)), some
    offsets, values = program.groups.offsets, program.groups.values
    number = program.group[some]
    grouped = number >= 0
    size = np.where(grouped, np.diff(offsets)[number], 1)
    which = np.repeat(np.arange(len(some)), size)
    within = np.arange(len(which)) - np.repeat(np.cumsum(size) - size, size)
    members = some[which].astype(np.int64)
    mine = np.flatnonzero(grouped[which])
    members[mine] = values[offsets[number[which[mine]]] + within[mine]]
    return which, members


def _in_turn(program: Program, model: StreamModel, shared_processor: bool) -> Edges:
    rows = in_turn(program, model, shared_processor=shared_processor)
    none = np.zeros(0, dtype=np.int64)
    return (
        np.concatenate([none, *(row[:-1] for row in rows)]),
        np.concatenate([none, *(row[1:] for row in rows)]),
    )
