"""What the operations of a step hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.selective import Recording
from pipeproof.exec.stage import Stage
from pipeproof.exec.stash import Stash
from pipeproof.exec.step import Step
from pipeproof.sched import BufferKind, Op, Program
from pipeproof.sched.instructions import Buffer, Instruction

INPUTS = (BufferKind.INPUT, BufferKind.STORED_INPUT)
OUTPUT, OUTPUT_GRAD = BufferKind.OUTPUT, BufferKind.OUTPUT_GRAD
INPUT_GRAD = BufferKind.INPUT_GRAD

Homes = Mapping[tuple[int, int], Stage]
"""By stage and device of the schedule, the stages that this process runs."""

Of = tuple[int, int, int]
"""Stage, micro-batch and slice."""


class Workspace:
    """One process's.

    Args:
        program: lowered.
        homes: the stages, on their devices.

    Attributes:
        program, homes: as given.
        values: of each buffer of the program.
        step: the one under way.
        autocast: whether it runs under autocast.
        stashes: what forwards stored that is offloaded.
        carried: of each slice, the leaves that the one before it left to it.
        carried_grads: of these, what its backward leaves to that one.
        recordings: of forwards of which an R will run some units again.
        input_of: the buffer of each forward's input; of a reloaded one the last,
            which its backward reads.
        brought_to: the buffers of what comes to it over skips, by the stage they are
            from.
    """

    def __init__(self, program: Program, homes: Homes) -> None:
        self.program, self.homes = program, homes
        self.values: list[Any] = [None] * len(program.buffers)
        self._empty = tuple(self.values)
        self.step: Step
        self.autocast = False
        self.stashes: dict[Of, Stash] = {}
        self.carried: dict[Of, tuple[Any, ...]] = {}
        self.carried_grads: dict[Of, list[Tensor | None]] = {}
        self.recordings: dict[Of, Recording] = {}
        inputs = np.flatnonzero(np.isin(program.buffers[:, 0], INPUTS))
        owners = program.buffers[inputs, 2:5].tolist()
        over = np.full(len(inputs), -1)
        if program.schedule.skips:
            over = program.buffer_skips[inputs]
        self.input_of: dict[Of, int] = {}
        self.brought_to: dict[Of, dict[int, int]] = {}
        for owner, index, skip in zip(owners, inputs.tolist(), over.tolist()):
            if skip < 0:
                self.input_of[tuple(owner)] = index
            else:
                source = program.schedule.skips[skip][0]
                self.brought_to.setdefault(tuple(owner), {})[source] = index

    def stage(self, op: Op, instruction: Instruction) -> Stage:
        """That an op runs on."""
        return self.homes[op.stage, instruction.stream.device]

    def leaves(self, op: Op, instruction: Instruction) -> list[Tensor]:
        """The leaves of the graph that a forward made; an OFFLOAD reads them."""
        read = find(instruction.reads, INPUTS, op)
        carry = self.carried.get(of(op), ())
        brought = [self.values[b.index] for b in coming(instruction, op)]
        leaves = tensors.flat((self.values[read], brought, carry))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self.values[:] = self._empty
        self.stashes.clear()
        self.carried.clear()
        self.carried_grads.clear()
        self.recordings.clear()
        del self.step


def of(op: Op) -> Of:
    """What an op works on."""
    return op.stage, op.micro_batch, op.slice


def belongs(buffer: Buffer, op: Op) -> bool:
    """Whether a buffer is of what an op works on."""
    return (buffer.stage, buffer.micro_batch, buffer.slice) == of(op)


def find(buffers: Sequence[Buffer], kinds: Sequence[BufferKind], op: Op) -> int:
    """The op's own buffer of one of these kinds; -1 where there is none."""
    for buffer in buffers:
        if buffer.kind in kinds and buffer.skip is None and belongs(buffer, op):
            return buffer.index
    return -1


def going(instruction: Instruction, op: Op) -> list[tuple[int, int]]:
    """The stages that a forward gives to over skips, and the buffers."""
    return [
        (buffer.skip[1], buffer.index)
        for buffer in instruction.writes
        if buffer.skip and buffer.kind == OUTPUT and belongs(buffer, op)
    ]


def coming(instruction: Instruction, op: Op) -> list[Buffer]:
    """The buffers in which an op finds what came over skips."""
    return [
        buffer
        for buffer in instruction.reads
        if buffer.skip and buffer.kind in INPUTS and belongs(buffer, op)
    ]
