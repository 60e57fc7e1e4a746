"""The program, bound to tensors: one function for each instruction.

    F    input ──stage──▶ output ──detach──▶ what is handed on
           ▲                 │
           leaf              its end of the graph is kept as ACTIVATION
    B    the root and the gradient that arrived ──autograd──▶ leaf.grad, .grad
    I    the same ──autograd──▶ the leaf's gradient, and what W has left to do
    W    that ──autograd──▶ .grad

The output of a stage is detached, and marked as wanting a gradient where the
output did: it is the leaf of the next stage's graph. So each stage has a graph
of its own, and a backward needs nothing but the two ends of it.

Binding happens once. A step is a walk over the functions in the program's
order, which waits for nothing: that order has every instruction after all it
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.batch import Value, check_loss
from pipeproof.exec.clock import Clock
from pipeproof.exec.errors import LossError, ModelError, StepError
from pipeproof.exec.rng import generators, key, seed
from pipeproof.exec.stage import Stage
from pipeproof.sched import Action, BufferKind, Kind, Op, Program
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.program import Buffer, Instruction

LossFn = Callable[[Any, Any], Tensor]
Run = Callable[[], None]
INPUTS = (BufferKind.INPUT, BufferKind.STORED_INPUT)


@dataclass
class Step:
    """What changes from step to step.

    Attributes:
        seed: of all its randomness.
        inputs, targets: of each micro-batch, on the first and the last device.
        factors: of each micro-batch's loss; None for not at all.
        losses: of each micro-batch, with its factor, once it is known.
        input_grads: of each micro-batch, where the inputs want a gradient.
    """

    seed: int
    inputs: list[Value]
    targets: list[Value]
    factors: list[float | None]
    losses: list[Tensor | None] = field(default_factory=list)
    input_grads: list[Value | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.losses = [None] * len(self.inputs)
        self.input_grads = [None] * len(self.inputs)


class Runtime:
    """Runs the steps of a program in one process.

    Args:
        program: lowered; F, B and R.
        stages: on their devices.
        loss_fn: (output of the last stage, targets) → scalar.
    """

    def __init__(
        self, program: Program, stages: Sequence[Stage], loss_fn: LossFn
    ) -> None:
        self._program = program
        self._stages = stages
        self._loss_fn = loss_fn
        self._loss_unit = stages[-1].first_unit + len(stages[-1].units)
        self._loss_generators = generators(stages[-1].device)
        self._values: list[Any] = [None] * len(program.buffers)
        self._step: Step
        self._autocast = False
        inputs = np.flatnonzero(np.isin(program.buffers[:, 0], INPUTS))
        owners = program.buffers[inputs, 2:4].tolist()
        self._input_of = dict(zip(map(tuple, owners), inputs.tolist()))
        self._runs: list[Run] = [self._bind(instruction) for instruction in program]
        self._busy = [
            (i, run) for i, run in enumerate(self._runs) if run is not _nothing
        ]

    def run(self, step: Step) -> None:
        """All instructions, in the program's order.

        Raises:
            StepError: something in the model or the loss failed; the cause is
                chained.
        """
        index = -1
        self._begin(step)
        try:
            for index, run in self._busy:  # noqa: B007
                run()
        except Exception as error:
            raise self._broken(index, error) from error
        finally:
            self._end()

    def run_timed(self, step: Step) -> tuple[list[float], list[float]]:
        """As `run`; when each instruction started and ended, in seconds."""
        index = -1
        clock = Clock([stage.device for stage in self._stages])
        device_of = [self._device(i) for i in range(len(self._program))]
        self._begin(step)
        try:
            for index, run in enumerate(self._runs):
                clock.mark(device_of[index])
                run()
                clock.mark(device_of[index])
        except Exception as error:
            raise self._broken(index, error) from error
        finally:
            self._end()
        return clock.read()

    def _begin(self, step: Step) -> None:
        self._step = step
        self._autocast = any(
            torch.is_autocast_enabled(device.type)
            for device in {stage.device for stage in self._stages}
        )
        for stage in self._stages:
            stage.begin()

    def _end(self) -> None:
        """Let go of every tensor of the step, whether or not it came to its end."""
        self._values[:] = [None] * len(self._values)
        del self._step

    def _device(self, index: int) -> torch.device:
        device = int(self._program.device[index])
        placement = self._program.schedule.placement.pipes[0]
        return self._stages[placement.index(device)].device

    def _broken(self, index: int, error: Exception) -> Exception:
        instruction = self._program[index]
        if instruction.ops:
            op = instruction.ops[0]
            where = f"{op} (stage {op.stage}, micro-batch {op.micro_batch}"
        else:
            where = f"{instruction.label} ("
        where += f"{', ' if instruction.ops else ''}device {self._device(index)})"
        text = (
            f"the step broke off at {where}: {type(error).__name__}: {error}\n"
            "Gradients of some micro-batches are in .grad and others are not: zero "
            "them before the next step."
        )
        return (
            type(error)(text) if isinstance(error, PipeproofError) else StepError(text)
        )

    def _bind(self, instruction: Instruction) -> Run:
        match instruction.action:
            case Action.COMPUTE:
                runs = [self._bind_op(op, instruction) for op in instruction.ops]
                if len(runs) == 1:
                    return runs[0]
                return lambda: _in_turn(runs)
            case Action.SEND:
                return self._bind_send(instruction)
            case Action.RECV:
                return _nothing
            case Action.LOCAL:
                (source,), (target,) = instruction.reads, instruction.writes
                return _hand_over(self._values, source.index, target.index)
        raise AssertionError(f"not bound: {instruction.label}")

    def _bind_op(self, op: Op, instruction: Instruction) -> Run:
        match op.kind:
            case Kind.F:
                return self._bind_forward(op, instruction)
            case Kind.R:
                return self._bind_recompute(op, instruction)
            case Kind.B:
                return self._bind_backward(op, instruction)
            case Kind.I:
                if self._next_op(instruction) == op._replace(kind=Kind.W):
                    return self._bind_backward(op, instruction)
                return self._bind_input_grad(op, instruction)
            case Kind.W:
                return self._bind_weight_grad(op, instruction)
        raise AssertionError(f"not bound: {op}")

    def _bind_forward(self, op: Op, instruction: Instruction) -> Run:
        stage, values, micro_batch = (
            self._stages[op.stage],
            self._values,
            op.micro_batch,
        )
        compute = self._bind_stage(op, instruction)
        out = _find(instruction.writes, (BufferKind.OUTPUT,), op)
        stash = _find(instruction.writes, (BufferKind.ACTIVATION,), op)
        brought = _find(instruction.writes, INPUTS, op)

        def bring_in() -> None:
            """The first stage's F brings its own input in."""
            values[brought] = tensors.handed_on(self._step.inputs[micro_batch])

        def keep() -> None:
            if brought >= 0:
                bring_in()
            output = compute()
            values[stash] = tensors.root(output)
            if out >= 0:
                values[out] = tensors.handed_on(output)

        def forget() -> None:
            if brought >= 0:
                bring_in()
            with torch.no_grad(), stage.noting_changes():
                output = compute()
            if self._autocast:
                # Casts of weights made here have no graph; cached, they would
                # cut the weights off from every later forward.
                torch.clear_autocast_cache()
            if out >= 0:
                values[out] = tensors.handed_on(
                    output, stage.trains or tensors.wants_grad(values[read])
                )

        read = _find(instruction.reads + instruction.writes, INPUTS, op)
        return keep if stash >= 0 else forget

    def _bind_recompute(self, op: Op, instruction: Instruction) -> Run:
        stage, values = self._stages[op.stage], self._values
        compute = self._bind_stage(op, instruction)
        stash = _find(instruction.writes, (BufferKind.ACTIVATION,), op)

        def recompute() -> None:
            with stage.unchanged():
                values[stash] = tensors.root(compute())

        return recompute

    def _bind_stage(self, op: Op, instruction: Instruction) -> Callable[[], Value]:
        """From the stage's input to its output; of the last stage, to the loss."""
        stage, values, micro_batch = (
            self._stages[op.stage],
            self._values,
            op.micro_batch,
        )
        read = _find(instruction.reads + instruction.writes, INPUTS, op)
        last = stage is self._stages[-1]

        def compute() -> Value:
            value = values[read]
            before = tensors.versions(value)
            output = stage.run(value, self._step.seed, micro_batch)
            if tensors.versions(value) != before:
                what = f"stage {op.stage - 1}'s output" if op.stage else "the batch"
                raise ModelError(
                    f"stage {op.stage} changes its input in place, which is {what}: "
                    "make its first operation work out of place"
                )
            return self._loss(output, micro_batch) if last else stage.checked(output)

        return compute

    def _loss(self, output: Any, micro_batch: int) -> Tensor:
        step = self._step
        seed(self._loss_generators, key(step.seed, self._loss_unit, micro_batch))
        found = self._loss_fn(output, step.targets[micro_batch])
        loss = check_loss(found, micro_batch)
        factor = step.factors[micro_batch]
        if factor == 0:
            # What does not count may be undefined: a mean over no tokens is NaN.
            loss = torch.zeros_like(loss, requires_grad=False)
        elif factor is not None:
            loss = loss * factor
        if step.losses[micro_batch] is None:
            step.losses[micro_batch] = loss.detach()
        return loss

    def _bind_backward(self, op: Op, instruction: Instruction) -> Run:
        values = self._values
        stash = _find(instruction.reads, (BufferKind.ACTIVATION,), op)
        read = self._input_of[op.stage, op.micro_batch]
        arrived = _find(instruction.reads, (BufferKind.OUTPUT_GRAD,), op)
        passed = _find(instruction.writes, (BufferKind.INPUT_GRAD,), op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]
        first, micro_batch = op.stage == 0, op.micro_batch
        last = op.stage == len(self._stages) - 1

        def backward() -> None:
            root = values[stash]
            if not last:
                tensors.backward(root, values[arrived])
            else:
                self._has_graph(root, micro_batch)
                if root is not None:
                    torch.autograd.backward(root)
            if passed >= 0:
                values[passed] = tensors.grads(values[read])
            elif first and tensors.wants_grad(values[read]):
                self._step.input_grads[micro_batch] = tensors.grads(values[read])
            for buffer in frees:
                values[buffer] = None

        return backward

    def _bind_input_grad(self, op: Op, instruction: Instruction) -> Run:
        """I: as B, but for what is left to W."""
        values, splitter = self._values, self._stages[op.stage].splitter
        stash = _find(instruction.reads, (BufferKind.ACTIVATION,), op)
        rest = _find(instruction.writes, (BufferKind.WEIGHT_STASH,), op)
        read = self._input_of[op.stage, op.micro_batch]
        arrived = _find(instruction.reads, (BufferKind.OUTPUT_GRAD,), op)
        passed = _find(instruction.writes, (BufferKind.INPUT_GRAD,), op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]
        first, micro_batch = op.stage == 0, op.micro_batch
        last = op.stage == len(self._stages) - 1

        def input_grad() -> None:
            root = values[stash]
            if last:
                self._has_graph(root, micro_batch)
                gradient = None if root is None else torch.ones_like(root)
            else:
                gradient = values[arrived]
            found, values[rest] = tensors.halved(splitter, root, gradient, values[read])
            if passed >= 0:
                values[passed] = found
            elif first and tensors.wants_grad(values[read]):
                self._step.input_grads[micro_batch] = found
            for buffer in frees:
                values[buffer] = None

        return input_grad

    def _bind_weight_grad(self, op: Op, instruction: Instruction) -> Run:
        values = self._values
        rest = _find(instruction.reads, (BufferKind.WEIGHT_STASH,), op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]

        def weight_grad() -> None:
            if values[rest] is not None:  # else I was B
                values[rest].run()
            for buffer in frees:
                values[buffer] = None

        return weight_grad

    def _has_graph(self, root: Tensor | None, micro_batch: int) -> None:
        if root is None and self._step.factors[micro_batch] != 0:
            raise LossError(
                f"micro-batch {micro_batch}: the loss depends on nothing that "
                "requires a gradient"
            )

    def _next_op(self, instruction: Instruction) -> Op | None:
        """The op that its device computes next, if it stands alone."""
        stream = self._program.by_stream[self._program.stream[instruction.index]]
        place = int(np.searchsorted(stream, instruction.index)) + 1
        if place == len(stream):
            return None
        ops = self._program[int(stream[place])].ops
        return ops[0] if len(ops) == 1 else None

    def _bind_send(self, instruction: Instruction) -> Run:
        """In one process a send puts the tensor where the receive wants it."""
        values, message = self._values, instruction.message
        assert message is not None
        read = instruction.reads[0].index
        write = self._program.writes[message.recv][0]
        target = self._stages[message.target_stage].device
        if self._stages[message.source_stage].device == target:
            return _hand_over(values, read, write)

        def copy_over() -> None:
            values[write], values[read] = tensors.moved(values[read], target), None

        return copy_over


def _nothing() -> None:
    """What a receive has left to do in one process."""


def _hand_over(values: list[Any], read: int, write: int) -> Run:
    def hand_over() -> None:
        values[write], values[read] = values[read], None

    return hand_over


def _in_turn(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


def _belongs(buffer: Buffer, op: Op) -> bool:
    return (buffer.stage, buffer.micro_batch) == (op.stage, op.micro_batch)


def _find(buffers: Sequence[Buffer], kinds: Sequence[BufferKind], op: Op) -> int:
    """The op's own buffer of one of these kinds; -1 where there is none."""
    for buffer in buffers:
        if buffer.kind in kinds and _belongs(buffer, op):
            return buffer.index
    return -1
