"""What the buffers of a program weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.program import Program


@dataclass(frozen=True)
class Weights:
    """What a buffer weighs, by what it is.

    Attributes:
        by_kind: for kinds that weigh anything, one number for each pipe and stage,
            four times over: as it is; where its activations are recomputed; where
            the backward is split; and where both. A copy weighs what it is one of.
        by_skip: for each of the schedule's skips, what goes over it, if that weighs
            anything.
    """

    by_kind: Mapping[BufferKind, NDArray[Any]]
    by_skip: NDArray[Any] | None = None

    def column(self, program: Program) -> NDArray[Any]:
        """One number for each buffer."""
        schedule = program.schedule
        kind, place = program.buffers[:, 0], program.buffers[:, 2].copy()
        size = np.int32(len(schedule.placement.pipes) * schedule.stages)
        if len(schedule.placement.pipes) > 1:
            pipe = schedule.pipe_of[np.maximum(program.buffers[:, 3], 0)]
            place += pipe * np.int32(schedule.stages)
        if schedule.has(Kind.R):
            place += _beside(BufferKind.STORED_INPUT, program) * size
        if schedule.has(Kind.W):
            place += _beside(BufferKind.WEIGHT_STASH, program) * (2 * size)
        over = self.by_skip
        columns = [*self.by_kind.values(), *([] if over is None else [over])]
        result = np.zeros(len(kind), dtype=np.result_type(*columns))
        for member, numbers in self.by_kind.items():
            where = np.flatnonzero(kind == member)
            result[where] = numbers[place[where]]
        if len(program.buffer_skips):
            where = np.flatnonzero(program.buffer_skips >= 0)
            skips = program.buffer_skips[where]
            result[where] = 0 if over is None else over[skips]
        if schedule.has(Kind.OFFLOAD):
            # An OFFLOAD frees buffers and writes their copies, in one order.
            copying = np.flatnonzero(program.op_kind == Kind.OFFLOAD)
            copies = program.writes.values[np.isin(program.writes.owner, copying)]
            freed = program.frees.values[np.isin(program.frees.owner, copying)]
            result[copies] = result[freed]
        return result


@dataclass(frozen=True)
class Sizes:
    """What each buffer of a program weighs.

    Attributes:
        activations: per buffer, or by what it is, in micro-batches of its device's
            share.
        bytes: per buffer, or None where bytes are not known.
        resident: bytes that each device holds all the time, by class.
        workspace: per instruction, bytes that are there only while it runs.
        arriving: per buffer, the bytes of it until a forward takes it up, where a
            forward that will be recomputed adds to what has arrived.
    """

    activations: NDArray[Any] | Weights
    bytes: NDArray[Any] | None = None
    resident: Mapping[str, list[Number]] | None = None
    workspace: NDArray[Any] | None = None
    arriving: NDArray[Any] | None = None

    def known_bytes(self) -> NDArray[Any]:
        """The bytes.

        Raises:
            ParameterError: there are none.
        """
        if self.bytes is None:
            raise ParameterError(
                "no bytes are known: give the Cost activation_bytes, boundary_bytes, "
                "weight_bytes, …"
            )
        return self.bytes


def _beside(kind: BufferKind, program: Program) -> NDArray[np.bool_]:
    """Buffers whose stage and micro-batch also has a buffer of this kind."""
    there: NDArray[np.bool_] = program.buffers[:, 0] == kind
    key = program.buffers[:, 2:5].astype(np.int64) @ _strides(program.schedule)
    return np.isin(key, key[there])


def _strides(schedule: Schedule) -> NDArray[np.int64]:
    """Weights that number (stage, micro-batch, slice) uniquely."""
    stages, slices = schedule.stages, schedule.slices
    return np.array([1, stages * slices, stages], dtype=np.int64)
