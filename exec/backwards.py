"""B, I and W, bound to tensors: from the end of a stage's graph to its leaves.

    B    the root and the gradient that arrived ──autograd──▶ leaf.grad, .grad
    I    the same ──autograd──▶ the leaf's gradient, and what W has left to do
    W    that ──autograd──▶ .grad

What a slice carried on, and what went over a skip connection, has roots of its own and
gradients that arrive; what the stage was given so, leaves of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.engine import backward as run_backward
from pipeproof.exec.errors import LossError
from pipeproof.exec.replicas import Run
from pipeproof.exec.split import Root
from pipeproof.exec.workspace import (
    INPUT_GRAD,
    OUTPUT_GRAD,
    Workspace,
    belongs,
    find,
    of,
)
from pipeproof.sched import BufferKind, Kind, Op
from pipeproof.sched.instructions import Instruction


class Backwards:
    """Binds them.

    Args:
        space: that they share with forwards.
    """

    def __init__(self, space: Workspace) -> None:
        self._space, self._program = space, space.program
        self._sliced = space.program.schedule.slices > 1

    def bind(self, op: Op, instruction: Instruction) -> Run:
        """What a B does, or an I with its own W behind it."""
        values, leaf = self._space.values, self._space.input_of[of(op)]
        draws = self._space.stage(op, instruction).draws
        ends = self._bind_ends(op, instruction)
        pass_on = self._bind_passing(op, instruction)
        beside = self._bind_beside(op, instruction)

        def backward() -> None:
            roots, gradients = ends()
            if roots:
                with draws.refused():
                    run_backward(roots, gradients)
            if beside is not None:
                beside(tensors.grads(beside.leaves()))
            pass_on(tensors.grads(values[leaf]))

        return backward

    def bind_input_grad(self, op: Op, instruction: Instruction) -> Run:
        """What an I does: as B, but for what is left to W."""
        if self._w_is_next(op, instruction):
            return self.bind(op, instruction)
        values, leaf = self._space.values, self._space.input_of[of(op)]
        stage = self._space.stage(op, instruction)
        splitter, draws = stage.splitter, stage.draws
        ends = self._bind_ends(op, instruction)
        pass_on = self._bind_passing(op, instruction)
        beside = self._bind_beside(op, instruction)
        rest = find(instruction.writes, (BufferKind.WEIGHT_STASH,), op)

        def input_grad() -> None:
            roots, gradients = ends()
            value = values[leaf]
            others = None if beside is None else beside.leaves()
            leaves = tensors.learning(value if others is None else (value, others))
            found: list[Tensor | None] = [None] * len(leaves)
            if roots:
                with draws.refused():
                    found, values[rest] = splitter.input_grads(roots, gradients, leaves)
            by_leaf = iter(found)
            gradient = tensors.like(value, by_leaf)
            if beside is not None:
                beside(tensors.like(others, by_leaf))
            pass_on(gradient)

        return input_grad

    def bind_weight_grad(self, op: Op, instruction: Instruction) -> Run:
        """What a W does."""
        values = self._space.values
        rest = find(instruction.reads, (BufferKind.WEIGHT_STASH,), op)
        frees = [b.index for b in instruction.frees if belongs(b, op)]

        def weight_grad() -> None:
            if values[rest] is not None:  # else I was B
                values[rest].run()
            for buffer in frees:
                values[buffer] = None

        return weight_grad

    def _bind_ends(
        self, op: Op, instruction: Instruction
    ) -> Callable[[], tuple[list[Root], list[Tensor]]]:
        """Where the backward starts: at the output, and at what was carried on."""
        values, carried_grads = self._space.values, self._space.carried_grads
        stash = find(instruction.reads, (BufferKind.ACTIVATION,), op)
        arrived = find(instruction.reads, (BufferKind.OUTPUT_GRAD,), op)
        over = [
            (buffer.skip[1], buffer.index)
            for buffer in instruction.reads
            if buffer.skip and buffer.kind == OUTPUT_GRAD and belongs(buffer, op)
        ]
        last = op.stage == self._program.schedule.stages - 1
        following = op.stage, op.micro_batch, op.slice + 1

        def ends() -> tuple[list[Root], list[Tensor]]:
            root, carried, left = values[stash]
            if last:
                gradient = None if root is None else torch.ones_like(root)
            else:
                gradient = values[arrived]
            roots, gradients = tensors.ends(root, gradient)
            if carried:
                grads = carried_grads.pop(following)
                more, theirs = tensors.ends(carried, tuple(grads))
                roots, gradients = roots + more, gradients + theirs
            for target, buffer in over:
                more, theirs = tensors.ends(left[target], values[buffer])
                roots, gradients = roots + more, gradients + theirs
            if last and root is None:
                self._lossless(op)
            return roots, gradients

        return ends

    def _lossless(self, op: Op) -> None:
        if self._space.step.factors[op.micro_batch][op.slice] != 0:
            raise LossError(
                f"micro-batch {op.micro_batch}: the loss depends on nothing that "
                "requires a gradient"
            )

    def _bind_passing(self, op: Op, instruction: Instruction) -> Callable[[Any], None]:
        """Pass on the gradient of the stage's input; free what is done with."""
        space, values = self._space, self._space.values
        passed = find(instruction.writes, (BufferKind.INPUT_GRAD,), op)
        frees = [b.index for b in instruction.frees if belongs(b, op)]
        first, leaf = op.stage == 0, space.input_of[of(op)]

        def pass_on(gradient: Any) -> None:
            if passed >= 0:
                values[passed] = gradient
            elif first and gradient is not None and tensors.wants_grad(values[leaf]):
                space.step.input_grads[op.micro_batch, op.slice] = gradient
            for buffer in frees:
                values[buffer] = None

        return pass_on

    def _bind_beside(self, op: Op, instruction: Instruction) -> _Beside | None:
        """Of what comes to the stage beside its input, if anything does."""
        came = self._space.brought_to.get(of(op), {})
        if not came and not self._sliced:
            return None
        back = {
            buffer.skip[0]: buffer.index
            for buffer in instruction.writes
            if buffer.skip and buffer.kind == INPUT_GRAD and belongs(buffer, op)
        }
        pairs = [(buffer, back[source]) for source, buffer in came.items()]
        return _Beside(self._space, op, pairs)

    def _w_is_next(self, op: Op, instruction: Instruction) -> bool:
        """Whether an I stands alone, and its own W alone behind it.

        In an overlap group another W may stand between the two, and come first.
        """
        program = self._program
        stream = program.by_stream[program.stream[instruction.index]]
        place = int(np.searchsorted(stream, instruction.index)) + 1
        if len(instruction.ops) > 1 or place == len(stream):
            return False
        return program[int(stream[place])].ops == (op._replace(kind=Kind.W),)


class _Beside:
    """What comes to a stage beside its input: the carry, and over skips.

    Args:
        space: where it lies.
        op: the backward that leads to it.
        skips: the buffers of what came over skips, and of its gradients.
    """

    def __init__(self, space: Workspace, op: Op, skips: list[tuple[int, int]]) -> None:
        self._space, self._of, self._skips = space, of(op), skips

    def leaves(self) -> tuple[Any, list[Any]]:
        """Those of the carry, and of the skips."""
        values = self._space.values
        carry = self._space.carried.get(self._of, ())
        return carry, [values[buffer] for buffer, _ in self._skips]

    def __call__(self, gradients: tuple[Any, list[Any]]) -> None:
        """Pass on the gradients of these."""
        carry, came = gradients
        for (_, buffer), gradient in zip(self._skips, came):
            self._space.values[buffer] = gradient
        if self._of in self._space.carried:
            del self._space.carried[self._of]
            self._space.carried_grads[self._of] = tensors.flat(carry)
