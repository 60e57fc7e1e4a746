"""The sums of ties, at the end of a lowered program, and the STEPs that wait for them.

Each device that holds a stage of a tie has one TIE, behind all that it computes. It
reads the gradients of its stages, meets those of the other devices, and writes the sum
of all to a buffer of its own::

    device 0 | tie 0=3 after 0B2; reads gradient 0; writes tied 0=3 ──┐ start
    device 3 | tie 0=3 after 3B2; reads gradient 3; writes tied 0=3 ──┘ as one

They stand last in the list, tie by tie, so that all devices come to those that they
share in one order, and wait for what stands to their left alone: what `lower` says of
deadlocks holds for them too. They run on the streams of REDUCEs, behind these.

A device's first STEP of a stage that is in a tie, and with it all that stand behind
it in its row, which are STEPs too, come behind the TIEs::

    device 0 | 0STEP after tie 0=3; reads gradient 0, tied 0=3
    device 3 | 3STEP after tie 0=3; reads gradient 3, tied 0=3

A TIE waits for none of its device's STEPs: those that stand before run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import Action, BufferKind, Stream, StreamKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.lists import Column, Lists
from pipeproof.sched.program import Program, Storage
from pipeproof.sched.ties import homes_of, tied_stages, ties_of_stage


def steps_behind(schedule: Schedule) -> NDArray[np.int64]:
    """Of each device of a clean schedule, how many of its last ops wait for sums."""
    ops, starts = schedule.ops, schedule.row_starts
    result = np.zeros(schedule.devices, dtype=np.int64)
    waits = (ops.kind == Kind.STEP) & np.isin(ops.stage, list(tied_stages(schedule)))
    for index in np.flatnonzero(waits)[::-1].tolist():
        device = int(schedule.device_of_op[index])
        result[device] = starts[device + 1] - index
    return result


def without_them(schedule: Schedule) -> Schedule:
    """A clean schedule without the STEPs that come behind sums."""
    last = steps_behind(schedule)
    if not last.any():
        return schedule
    rows = [schedule.row(device) for device in range(schedule.devices)]
    return schedule.with_rows(
        [[row[: len(row) - n]] for row, n in zip(rows, last.tolist())]
    )


def with_sums(program: Program, schedule: Schedule, *, blocking: bool) -> Program:
    """Behind a program the sums of its schedule's ties, and the STEPs that wait.

    Args:
        program: of the schedule `without_them`.
        schedule: all of it.
        blocking: an op waits for what the one before it sends.
    """
    sums = [
        _Sum(number, device, tuple(stages))
        for number, tie in enumerate(schedule.ties)
        for device, stages in homes_of(schedule, tie).items()
    ]
    steps = list(_steps(schedule))
    streams = list(program.streams)
    place = {s.device: n for n, s in enumerate(streams) if s.kind == StreamKind.REDUCE}
    for device in dict.fromkeys(one.device for one in sums):
        if device not in place:
            place[device] = len(streams)
            streams.append(Stream(device, StreamKind.REDUCE))
    index = {(one.tie, one.device): len(program) + n for n, one in enumerate(sums)}
    waits = [_last_compute(program, one.device) for one in sums]
    for step in steps:
        ties = [index[tie, step.device] for tie in step.ties]
        sent = _sends(program, step.device) if blocking and step.is_first else []
        waits.append([*sent, *ties])
    on = [place[one.device] for one in sums] + [step.device for step in steps]
    actions = [Action.TIE] * len(sums) + [Action.COMPUTE] * len(steps)
    nothing = [-1] * len(sums)
    return replace(
        program,
        schedule=schedule,
        streams=tuple(streams),
        stream=_behind(program.stream, on),
        action=_behind(program.action, actions),
        first_op=_behind(_in_all(program, schedule), [*nothing, *_ops(steps)]),
        op_count=_behind(program.op_count, [0] * len(sums) + [1] * len(steps)),
        message=_behind(program.message, [-1] * len(waits)),
        waits_for=_longer(program.waits_for, waits),
        storage=TiedStorage(program.storage, tuple(sums), tuple(steps)),
    )


@dataclass(frozen=True, slots=True)
class _Sum:
    """A device's part in the sum of a tie: its number, and the stages added here."""

    tie: int
    device: int
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """A STEP behind the sums.

    Attributes:
        op: its place in the schedule.
        device, stage: of it.
        ties: the numbers of those that the stage is in.
        is_first: of those on its device.
    """

    op: int
    device: int
    stage: int
    ties: tuple[int, ...]
    is_first: bool


def _steps(schedule: Schedule) -> Iterator[_Step]:
    """All that come behind the sums, device by device."""
    for device, size in enumerate(steps_behind(schedule).tolist()):
        behind = int(schedule.row_starts[device + 1])
        for op in range(behind - size, behind):
            stage = int(schedule.ops.stage[op])
            ties = tuple(ties_of_stage(schedule, stage))
            yield _Step(op, device, stage, ties, op == behind - size)


def _ops(steps: list[_Step]) -> list[int]:
    return [step.op for step in steps]


def _in_all(program: Program, schedule: Schedule) -> Column:
    """The first op of each instruction, as the whole schedule counts them."""
    left_out = schedule.row_starts - program.schedule.row_starts
    shift = np.where(program.first_op >= 0, left_out[program.device], 0)
    return (program.first_op + shift).astype(program.first_op.dtype)


def _last_compute(program: Program, device: int) -> list[int]:
    """The last instruction of a device that computes and is no STEP."""
    members = program.by_stream[device]
    others = members[program.op_kind[members] != Kind.STEP]
    return [int(others[-1])] if len(others) else []


def _sends(program: Program, device: int) -> list[int]:
    """The SENDs that wait for the last op of a device."""
    members = program.by_stream[device]
    ops = members[program.op_count[members] > 0]
    if not len(ops):
        return []
    waiting = program.waits_for.owner[program.waits_for.values == ops[-1]]
    return [int(i) for i in waiting if program.action[i] == Action.SEND]


@dataclass(frozen=True)
class TiedStorage:
    """The `Storage` of a lowered program with sums of ties and STEPs behind it."""

    base: Storage
    sums: tuple[_Sum, ...]
    steps: tuple[_Step, ...]
    by_op: ClassVar[bool] = True

    @property
    def message_count(self) -> int:
        """As in `Storage`."""
        return self.base.message_count

    @property
    def messages(self) -> Column:
        """As in `Storage`."""
        return self.base.messages

    @cached_property
    def buffers(self) -> Column:
        """As in `Storage`."""
        rows = [(BufferKind.TIED, s.device, s.tie, -1, 0, -1) for s in self.sums]
        return np.asfortranarray(
            np.concatenate([self.base.buffers, np.array(rows, dtype=np.int32)])
        )

    @cached_property
    def buffer_skips(self) -> Column:
        """As in `Storage`."""
        skips = self.base.buffer_skips
        return _behind(skips, [-1] * len(self.sums)) if len(skips) else skips

    @cached_property
    def reads(self) -> Lists:
        """As in `Storage`."""
        rows = self.base.buffers
        numbers = np.flatnonzero(rows[:, 0] == BufferKind.GRADIENT).tolist()
        gradient = {tuple(rows[number, 1:3].tolist()): number for number in numbers}
        tied = {(s.device, s.tie): n for n, s in enumerate(self.sums, len(rows))}
        of_sums = [[gradient[s.device, stage] for stage in s.stages] for s in self.sums]
        of_steps = [
            [gradient[s.device, s.stage], *(tied[s.device, tie] for tie in s.ties)]
            for s in self.steps
        ]
        return _longer(self.base.reads, of_sums + of_steps)

    @cached_property
    def writes(self) -> Lists:
        """As in `Storage`."""
        first = count(len(self.base.buffers))
        of_sums = [[next(first)] for _ in self.sums]
        return _longer(self.base.writes, of_sums + [[] for _ in self.steps])

    @cached_property
    def frees(self) -> Lists:
        """As in `Storage`."""
        return _longer(self.base.frees, [[] for _ in (*self.sums, *self.steps)])


def _behind(column: np.ndarray, more: Sequence[int]) -> np.ndarray:
    return np.concatenate([column, np.array(more, dtype=column.dtype)])


def _longer(lists: Lists, more: list[list[int]]) -> Lists:
    """With more lists behind them."""
    further = Lists.of(more)
    offsets = (further.offsets[1:] + lists.offsets[-1]).astype(lists.offsets.dtype)
    return Lists(
        np.concatenate([lists.offsets, offsets]),
        np.concatenate([lists.values, further.values]),
    )
