"""What each device holds at once, however long ops take.

What a forward keeps is there until its backward, and a device runs its ops in order::

    device 1 | F0 F1 B0 F2 B1
      input of stage 1, slots 0 and 1    F0 takes slot 0, F1 slot 1, B0 lets go of 0:
                                         behind it the receive of F2's input is posted
      gradient, one slot                 posted from the start; behind B0 for B1

Beside that are an output and a gradient until they are sent, and what is received from
when the receive is posted: when its slot is free, and when the message before it on its
stream has come. That one may be made of what this device itself makes, and then cannot
come before::

    device 0 | 0F0 0F1 2F0 2F1    a receive of 2F0's input stands between those of other
    device 1 | 1F0 1F1 3F0 3F1    stages, behind what 0F0 hands on

So what lies in a device's memory follows from the order of the ops and from the
program, but for how soon other devices are. Here they are as soon as they can ever
be, links being free: no durations make it more, and some make it as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action, BufferKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.lists import Column
from pipeproof.sched.lower import lower
from pipeproof.sched.memory import lifetimes
from pipeproof.sched.moments import Moments
from pipeproof.sched.program import Program
from pipeproof.sched.skips import MAX_SKIPS

Floats = NDArray[np.float64]
Index = NDArray[np.int64]


class Held(IntEnum):
    """What a device has of a stage, for one micro-batch.

    KEPT is what a forward keeps beside the stage's input, and LEFT the part of it that
    W still reads; AGAIN is likewise what an R rebuilds. STORED is all that a forward
    keeps which an R follows, and INPUT a stage's input that has come: of a forward
    without R, or until one with an R takes it up. GOING are outputs and gradients of
    them, RETURNED gradients of inputs.
    """

    KEPT = 0
    LEFT = 1
    AGAIN = 2
    AGAIN_LEFT = 3
    INPUT = 4
    STORED = 5
    GOING = 6
    RETURNED = 7


_OF = {
    BufferKind.ACTIVATION: Held.KEPT,
    BufferKind.WEIGHT_STASH: Held.LEFT,
    BufferKind.INPUT: Held.INPUT,
    BufferKind.STORED_INPUT: Held.INPUT,
    BufferKind.OUTPUT: Held.GOING,
    BufferKind.OUTPUT_GRAD: Held.GOING,
    BufferKind.INPUT_GRAD: Held.RETURNED,
}


@dataclass(frozen=True, slots=True)
class Holdings:
    """Of one device, in micro-batches; a slice is a part of one.

    Moments are while an op or overlap group of its row runs, and between two. Of a
    backward that is whole KEPT and LEFT go together.

    Attributes:
        stages: of which it ever has anything.
        held: [moment, `Held`, of `stages`] how many it has.
        skip_ends: [moment, which of the schedule's skips] likewise, of what has come
            over it, until its backward; and of what is to go, gradients too.
    """

    stages: list[int]
    held: Floats
    skip_ends: tuple[Floats, Floats]

    @property
    def skips(self) -> Floats:
        """[moment, which skip], of both."""
        return self.skip_ends[0] + self.skip_ends[1]


def holdings(schedule: Schedule, *, more_skips: bool = False) -> list[Holdings]:
    """Of each device, the most that it can ever have at once.

    Args:
        schedule: clean, of one step.
        more_skips: whatever skips it may have beside its own, which are not counted.

    Raises:
        UnsupportedError: as `lower`.
    """
    return _holdings(schedule, in_order=True, more_skips=more_skips)


def least_and_most(program: Program) -> tuple[list[Holdings], list[Holdings]]:
    """Of each device, moment by moment, what it has at least and at most.

    Least is where everything comes just when it is needed, and others park nothing.
    """
    moments = Moments(program, in_order=True, more_skips=False)

    def of_all(*, late: bool) -> list[Holdings]:
        spans = _Spans.of(program, moments, late=late)
        return [_on(d, spans, program) for d in range(program.schedule.devices)]

    return of_all(late=True), of_all(late=False)


def skips_between_any(schedule: Schedule) -> list[Floats]:
    """Of each device, [which, moment, stage]: what it has of the skips of a stage.

    Of the skip to the stage (0), and of the one from it (1), of which there are most,
    whichever stages are at the other end and however many other skips there are.

    Args:
        schedule: as for `holdings`, whose moments these are.
    """
    stages = schedule.stages
    pairs = [(s, t) for s in range(stages) for t in range(s + 2, stages)]
    found: list[Floats] = []
    for begin in range(0, max(len(pairs), 1), MAX_SKIPS):
        skips = pairs[begin : begin + MAX_SKIPS]
        held = _holdings(schedule.with_skips(skips), in_order=False, more_skips=True)
        found = found or [np.zeros((2, len(of.held), stages)) for of in held]
        for of, most in zip(held, found):
            for way, ends in enumerate(reversed(tuple(zip(*skips)))):
                for stage in set(ends):
                    these = of.skip_ends[way][:, np.array(ends) == stage]
                    most[way, :, stage] = np.maximum(
                        most[way, :, stage], these.max(axis=1)
                    )
    return found


def _holdings(
    schedule: Schedule, *, in_order: bool, more_skips: bool
) -> list[Holdings]:
    program = lower(schedule)
    moments = Moments(program, in_order=in_order, more_skips=more_skips)
    spans = _Spans.of(program, moments)
    return [_on(device, spans, program) for device in range(schedule.devices)]


@dataclass(frozen=True)
class _Spans:
    """From when to when something is there, device by device.

    Attributes:
        device, stage, held: of each, where it lies and what it is.
        skip: over which it goes; -1 for none.
        first, behind: its moments, those of its source.
        source: the device itself, or the one that parks it there.
        moments: of the program.
    """

    device: Column
    stage: Column
    held: NDArray[np.int8]
    skip: Column
    first: Column
    behind: Column
    source: Column
    moments: Moments

    @classmethod
    def of(cls, program: Program, moments: Moments, *, late: bool = False) -> _Spans:
        kind, device, stage = (program.buffers[:, column] for column in range(3))
        skip = np.full(len(kind), -1, dtype=np.int32)
        if len(program.buffer_skips):
            skip = program.buffer_skips
        held, in_one = held_as(program)
        first, behind = moments.of_buffers
        if late:
            first = moments.at_the_latest
        born, _ = lifetimes(program)
        source = np.where(moments.parked, program.device[born], device)
        columns: list[NDArray[Any]]
        columns = [device, stage, held, skip, first, behind, source]
        # What has arrived is an input until a forward takes it up.
        stored = np.flatnonzero((kind == BufferKind.STORED_INPUT) & (skip < 0))
        taken = moments.taken(stored, first[stored])
        later = [column[stored] for column in columns]
        later[2] = np.full(len(stored), Held.STORED, dtype=np.int8)
        later[4] = taken
        columns[5] = behind.copy()
        columns[5][stored] = taken
        whole = np.flatnonzero(in_one)
        both = [column[whole] for column in columns]
        both[2] = both[2] + 1
        parts = [
            [c[(some[2] >= 0) & (some[4] < some[5])] for c in some]
            for some in (columns, later, both)
        ]
        order = np.argsort(np.concatenate([some[0] for some in parts]), kind="stable")
        device, stage, held, skip, first, behind, source = (
            np.concatenate(some)[order] for some in zip(*parts)
        )
        return cls(device, stage, held, skip, first, behind, source, moments)


def _on(device: int, spans: _Spans, program: Program) -> Holdings:
    ends = np.array([device, device + 1], dtype=spans.device.dtype)
    here = np.arange(*np.searchsorted(spans.device, ends))
    stages = np.unique(spans.stage[here])
    sources = spans.source[here]
    held, over = _counted(device, here[sources == device], stages, spans, program)
    for source in np.unique(sources[sources != device]).tolist():
        parked = _counted(source, here[sources == source], stages, spans, program)
        for first, last, own, skips in zip(
            *spans.moments.meanwhile(device, source), held, over
        ):
            own += parked[0][first : last + 1].max(axis=0)
            skips += parked[1][first : last + 1].max(axis=0)
    return Holdings(stages.tolist(), held, (over[:, 0], over[:, 1]))


def _counted(
    device: int, these: Index, stages: Column, spans: _Spans, program: Program
) -> tuple[Floats, Floats]:
    """At each moment of a device, of these: [moment, `Held`, stage], and of skips.

    The latter [moment, come or to go, which of the schedule's].
    """
    schedule = program.schedule
    length, part = int(spans.moments.count[device]), 1 / schedule.slices
    held = np.zeros((length + 1, len(Held), len(stages)))
    over = np.zeros((length + 1, 2, len(schedule.skips)))
    targets = np.array([target for _, target in schedule.skips], dtype=np.int64)
    chain = these[spans.skip[these] < 0]
    skips = these[spans.skip[these] >= 0]
    for moment, by in ((spans.first, part), (spans.behind, -part)):
        column = np.searchsorted(stages, spans.stage[chain])
        at = np.minimum(moment[chain], length)
        np.add.at(held, (at, spans.held[chain], column), by)
        goes = (spans.stage[skips] != targets[spans.skip[skips]]).astype(np.int64)
        at = np.minimum(moment[skips], length)
        np.add.at(over, (at, goes, spans.skip[skips]), by)
    return np.cumsum(held, axis=0)[:-1], np.cumsum(over, axis=0)[:-1]


def held_as(program: Program) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """What each buffer is of `Held`, or -1; and whether it is what W reads as well.

    A backward in one has no buffer of its own for that. What a forward stores is an
    INPUT here.
    """
    kind, table = program.buffers[:, 0], program.schedule.table
    owner = tuple(program.buffers[:, column] for column in (3, 4, 2))
    held = np.full(len(kind), -1, dtype=np.int8)
    for member, what in _OF.items():
        held[kind == member] = what
    parked = kind == BufferKind.OFFLOADED
    held[parked] = held[_originals(program)[parked]]
    kept = (held == Held.KEPT) | (held == Held.LEFT)
    held[kept & table.has(Kind.R)[owner]] += Held.AGAIN
    whole = kept & (held % 2 == Held.KEPT) & ~table.has(Kind.W)[owner]
    return held, whole


def _originals(program: Program) -> Index:
    """Of each buffer that a COPY writes, the one of the same content that it reads."""
    result = np.arange(len(program.buffers))
    for index in np.flatnonzero(program.action == Action.COPY).tolist():
        for read, write in zip(program.reads[index], program.writes[index]):
            result[write] = result[read]
    return result


def largest(rows: Floats) -> Floats:
    """Of these those than which no other has as much of everything."""
    rows = np.unique(rows, axis=0)[::-1]
    kept: list[Floats] = []
    for row in rows:  # descending, so none later covers an earlier one
        if not any((row <= other).all() for other in kept):
            kept.append(row)
    return np.array(kept)
