"""The sums of ties, at the end of a lowered program.

Each device that holds a stage of a tie has one TIE, behind all that it computes. It
reads the gradients of its stages, meets those of the other devices, and writes the sum
of all to a buffer of its own::

    device 0 | tie 0=3 after 0B2; reads gradient 0; writes tied 0=3 ──┐ start
    device 3 | tie 0=3 after 3B2; reads gradient 3; writes tied 0=3 ──┘ as one

They stand last in the list, tie by tie, so that all devices come to those that they
share in one order, and wait for what stands to their left alone: what `lower` says of
deadlocks holds for them too. They run on the streams of REDUCEs, behind these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import ClassVar

import numpy as np

from pipeproof.sched.program import (
    Action,
    BufferKind,
    Column,
    Lists,
    Program,
    Storage,
    Stream,
    StreamKind,
)
from pipeproof.sched.ties import homes_of


def with_sums(program: Program) -> Program:
    """The same program, and behind it the sums of its schedule's ties."""
    schedule = program.schedule
    streams = list(program.streams)
    place = {s.device: n for n, s in enumerate(streams) if s.kind == StreamKind.REDUCE}
    last = [
        int(members[-1]) if len(members) else -1
        for members in program.by_stream[: schedule.devices]
    ]
    stream: list[int] = []
    waits: list[list[int]] = []
    sums: list[_Sum] = []
    for number, tie in enumerate(schedule.ties):
        for device, stages in homes_of(schedule, tie).items():
            if device not in place:
                place[device] = len(streams)
                streams.append(Stream(device, StreamKind.REDUCE))
            stream.append(place[device])
            waits.append([last[device]] if last[device] >= 0 else [])
            sums.append(_Sum(number, device, tuple(stages)))
    size = len(sums)
    return replace(
        program,
        streams=tuple(streams),
        stream=_behind(program.stream, stream),
        action=_behind(program.action, [Action.TIE] * size),
        first_op=_behind(program.first_op, [-1] * size),
        op_count=_behind(program.op_count, [0] * size),
        message=_behind(program.message, [-1] * size),
        waits_for=_longer(program.waits_for, waits),
        storage=TiedStorage(program.storage, tuple(sums)),
    )


@dataclass(frozen=True, slots=True)
class _Sum:
    """A device's part in the sum of a tie: its number, and the stages held here."""

    tie: int
    device: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class TiedStorage:
    """The `Storage` of a lowered program with sums of ties behind it."""

    base: Storage
    sums: tuple[_Sum, ...]
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
        return _longer(
            self.base.reads,
            [[gradient[s.device, stage] for stage in s.stages] for s in self.sums],
        )

    @cached_property
    def writes(self) -> Lists:
        """As in `Storage`."""
        first = count(len(self.base.buffers))
        return _longer(self.base.writes, [[next(first)] for _ in self.sums])

    @cached_property
    def frees(self) -> Lists:
        """As in `Storage`."""
        return _longer(self.base.frees, [[] for _ in self.sums])


def _behind(column: np.ndarray, more: list[int]) -> np.ndarray:
    return np.concatenate([column, np.array(more, dtype=column.dtype)])


def _longer(lists: Lists, more: list[list[int]]) -> Lists:
    """With more lists behind them."""
    further = Lists.of(more)
    offsets = (further.offsets[1:] + lists.offsets[-1]).astype(lists.offsets.dtype)
    return Lists(
        np.concatenate([lists.offsets, offsets]),
        np.concatenate([lists.values, further.values]),
    )
