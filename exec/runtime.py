"""The program, bound to tensors: one function for each instruction.

    F    input ──stage──▶ output ──detach──▶ what is handed on
           ▲                 │
           leaf              kept as ACTIVATION: the root of the stage's graph
    B    the root and the gradient that arrived ──autograd──▶ leaf.grad, .grad

The output of a stage is detached, and marked as wanting a gradient where the
output did: it is the leaf of the next stage's graph. So each stage has a graph
of its own, and a backward needs nothing but the two ends of it.

Binding happens once. A step is a walk over the functions in the program's
order, which waits for nothing: that order has every instruction after all it
needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec.batch import Value, check_loss
from pipeproof.exec.errors import LossError, ModelError, StepError
from pipeproof.exec.rng import generators
from pipeproof.exec.stage import Stage, seed
from pipeproof.sched import Action, BufferKind, Kind, Op, Program
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.program import Instruction

LossFn = Callable[[Any, Any], Tensor]
Run = Callable[[], None]


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
        self._wire: dict[int, Any] = {}
        self._step: Step
        self._autocast = False
        recomputed = program.schedule.ops
        self._again = {
            (op.stage, op.micro_batch) for op in recomputed if op.kind == Kind.R
        }
        self._runs: list[Run] = [self._bind(instruction) for instruction in program]

    def run(self, step: Step) -> None:
        """All instructions, in the program's order.

        Raises:
            StepError: something in the model or the loss failed; the cause is
                chained.
        """
        index = -1
        self._begin(step)
        try:
            for index, run in enumerate(self._runs):  # noqa: B007
                run()
        except Exception as error:
            raise self._broken(index, error) from error
        finally:
            self._end()

    def run_timed(self, step: Step) -> tuple[list[float], list[float]]:
        """As `run`; when each instruction started and ended, in seconds."""
        index = -1
        clock = _Clock([stage.device for stage in self._stages])
        device_of = [self._device(i) for i in range(len(self._program))]
        self._begin(step)
        try:
            for index, run in enumerate(self._runs):
                clock.start(device_of[index])
                run()
                clock.stop(device_of[index])
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
            stage.changed.clear()

    def _end(self) -> None:
        """Let go of every tensor of the step, whether or not it came to its end."""
        self._values[:] = [None] * len(self._values)
        self._wire.clear()
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
        return type(error)(text) if isinstance(error, PipeproofError) else StepError(text)

    def _bind(self, instruction: Instruction) -> Run:
        match instruction.action:
            case Action.COMPUTE:
                runs = [self._bind_op(op, instruction) for op in instruction.ops]
                if len(runs) == 1:
                    return runs[0]
                return lambda: [run() for run in runs] and None
            case Action.SEND:
                return self._bind_send(instruction)
            case Action.RECV:
                return self._bind_recv(instruction)
            case Action.LOCAL:
                return self._bind_local(instruction)
        raise AssertionError(f"not bound: {instruction.label}")

    def _bind_op(self, op: Op, instruction: Instruction) -> Run:
        match op.kind:
            case Kind.F:
                return self._bind_forward(op, instruction)
            case Kind.R:
                return self._bind_recompute(op, instruction)
            case Kind.B:
                return self._bind_backward(op, instruction)
        raise AssertionError(f"not bound: {op}")

    def _bind_forward(self, op: Op, instruction: Instruction) -> Run:
        again = (op.stage, op.micro_batch) in self._again
        stage, values = self._stages[op.stage], self._values
        compute = self._bind_stage(op, instruction)
        out = _find(instruction.writes, BufferKind.OUTPUT, op)
        stash = _find(instruction.writes, BufferKind.ACTIVATION, op)
        inputs = _find(instruction.writes, BufferKind.INPUT, op)
        if inputs < 0:
            inputs = _find(instruction.writes, BufferKind.STORED_INPUT, op)

        def begin() -> None:
            """The first stage's own F brings its input in."""
            if inputs >= 0:
                values[inputs] = _leaves(self._step.inputs[op.micro_batch])

        def keep() -> None:
            begin()
            _, root = compute()
            if stash >= 0:
                values[stash] = root
            if out >= 0:
                values[out] = _handed_on(root)

        def forget() -> None:
            begin()
            with torch.no_grad(), stage.noting_changes():
                value, root = compute()
            if self._autocast:
                # Casts of weights made here have no graph; cached, they would
                # cut the weights off from every later forward.
                torch.clear_autocast_cache()
            if out >= 0:
                values[out] = _handed_on(root, stage.trains or _wants_grad(value))

        return forget if again else keep

    def _bind_recompute(self, op: Op, instruction: Instruction) -> Run:
        stage, values = self._stages[op.stage], self._values
        compute = self._bind_stage(op, instruction)
        stash = _find(instruction.writes, BufferKind.ACTIVATION, op)

        def recompute() -> None:
            with stage.unchanged():
                _, values[stash] = compute()

        return recompute

    def _bind_stage(
        self, op: Op, instruction: Instruction
    ) -> Callable[[], tuple[Value, Value]]:
        """The stage's input, and its output (of the last stage: the loss)."""
        stage, values, micro_batch = self._stages[op.stage], self._values, op.micro_batch
        read = _find(instruction.reads + instruction.writes, BufferKind.INPUT, op)
        if read < 0:
            touched = instruction.reads + instruction.writes
            read = _find(touched, BufferKind.STORED_INPUT, op)
        first, last = op.stage == 0, stage is self._stages[-1]

        def compute() -> tuple[Value, Value]:
            value = values[read]
            before = _versions(value)
            output = stage.run(value, self._step.seed, micro_batch)
            if _versions(value) != before:
                what = "the batch" if first else f"stage {op.stage - 1}'s output"
                raise ModelError(
                    f"stage {op.stage} changes its input in place, which is {what}: "
                    "make its first operation work out of place"
                )
            if last:
                return value, self._loss(output, micro_batch)
            return value, stage.checked(output)

        return compute

    def _loss(self, output: Any, micro_batch: int) -> Tensor:
        step = self._step
        seed(self._loss_generators, step.seed, self._loss_unit, micro_batch)
        found = self._loss_fn(output, step.targets[micro_batch])
        loss = check_loss(found, micro_batch)
        factor = step.factors[micro_batch]
        if factor is not None:
            loss = loss * factor
        if step.losses[micro_batch] is None:
            step.losses[micro_batch] = loss.detach()
        return loss

    def _bind_backward(self, op: Op, instruction: Instruction) -> Run:
        values = self._values
        stash = _find(instruction.reads, BufferKind.ACTIVATION, op)
        read = _find(instruction.reads, BufferKind.INPUT, op)
        if read < 0:
            read = _find(instruction.reads, BufferKind.STORED_INPUT, op)
        arrived = _find(instruction.reads, BufferKind.OUTPUT_GRAD, op)
        passed = _find(instruction.writes, BufferKind.INPUT_GRAD, op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]
        first, micro_batch = op.stage == 0, op.micro_batch
        last = op.stage == len(self._stages) - 1

        def backward() -> None:
            root = values[stash]
            if last:
                if not root.requires_grad:
                    raise LossError(
                        f"micro-batch {micro_batch}: the loss depends on nothing that "
                        "requires a gradient"
                    )
                torch.autograd.backward(root)
            else:
                _backward(root, values[arrived])
            if passed >= 0:
                values[passed] = _grads(values[read])
            elif first and _wants_grad(values[read]):
                self._step.input_grads[micro_batch] = _grads(values[read])
            for buffer in frees:
                values[buffer] = None

        return backward

    def _bind_send(self, instruction: Instruction) -> Run:
        values, wire = self._values, self._wire
        message = instruction.message
        assert message is not None
        number, (buffer,) = message.index, instruction.reads
        source, read = self._stages[message.source_stage].device, buffer.index
        target = self._stages[message.target_stage].device

        def hand_over() -> None:
            wire[number], values[read] = values[read], None

        def copy_over() -> None:
            wire[number], values[read] = _moved(values[read], target), None

        return hand_over if source == target else copy_over

    def _bind_recv(self, instruction: Instruction) -> Run:
        values, wire = self._values, self._wire
        assert instruction.message is not None
        number, write = instruction.message.index, instruction.writes[0].index

        def receive() -> None:
            values[write] = wire.pop(number)

        return receive

    def _bind_local(self, instruction: Instruction) -> Run:
        values = self._values
        (source,), (target,) = instruction.reads, instruction.writes
        read, write = source.index, target.index

        def hand_over() -> None:
            values[write], values[read] = values[read], None

        return hand_over


class _Clock:
    """Start and end of each instruction: host time, or events where a GPU works."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._marks: list[Any] = []
        self._cuda = {d for d in devices if d.type == "cuda"}
        for device in self._cuda:
            torch.cuda.synchronize(device)
        self._origin = time.perf_counter()
        self._base = {device: self._event(device) for device in self._cuda}

    @staticmethod
    def _event(device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def start(self, device: torch.device) -> None:
        self._marks.append(self._now(device))

    stop = start

    def _now(self, device: torch.device) -> Any:
        if device in self._cuda:
            return device, self._event(device)
        return time.perf_counter() - self._origin

    def read(self) -> tuple[list[float], list[float]]:
        for device in self._cuda:
            torch.cuda.synchronize(device)
        times = [
            mark
            if isinstance(mark, float)
            else self._base[mark[0]].elapsed_time(mark[1]) / 1e3
            for mark in self._marks
        ]
        return times[::2], times[1::2]


def _belongs(buffer: Any, op: Op) -> bool:
    return (buffer.stage, buffer.micro_batch) == (op.stage, op.micro_batch)


def _find(buffers: Sequence[Any], kind: BufferKind, op: Op) -> int:
    """The op's own buffer of this kind; -1 where there is none."""
    for buffer in buffers:
        if buffer.kind == kind and _belongs(buffer, op):
            return int(buffer.index)
    return -1


def _each(value: Value, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, tuple):
        return tuple(change(tensor) for tensor in value)
    return change(value)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wants_grad(value: Value) -> bool:
    if isinstance(value, tuple):
        return any(tensor.requires_grad for tensor in value)
    return value.requires_grad


def _versions(value: Value) -> Any:
    return _each(value, lambda tensor: tensor._version)


def _leaves(value: Value) -> Value:
    return _each(value, _leaf)  # type: ignore[no-any-return]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _handed_on(root: Value, wants_grad: bool | None = None) -> Value:
    """A stage's output as the leaf of the next stage's graph.

    Args:
        root: the output.
        wants_grad: whether it may need a gradient, where the output itself does
            not know, made without a graph as it was.
    """
    if wants_grad is None:
        return _leaves(root)
    return _each(  # type: ignore[no-any-return]
        root,
        lambda tensor: tensor.detach().requires_grad_(
            wants_grad and _differentiable(tensor)
        ),
    )


def _moved(value: Any, device: torch.device) -> Any:
    def move(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        moved = tensor.detach().to(device, non_blocking=True)
        return moved.requires_grad_(tensor.requires_grad)

    return tuple(map(move, value)) if isinstance(value, tuple) else move(value)


def _grads(value: Value) -> Any:
    return _each(value, lambda tensor: tensor.grad)


def _backward(root: Value, gradient: Any) -> None:
    """Autograd from a stage's output down; what wants no gradient gets none."""
    if isinstance(root, Tensor):
        if root.requires_grad and gradient is not None:
            torch.autograd.backward(root, gradient)
        return
    pairs = [
        (tensor, grad)
        for tensor, grad in zip(root, gradient)
        if tensor.requires_grad and grad is not None
    ]
    if pairs:
        tensors, grads = zip(*pairs)
        torch.autograd.backward(tensors, grads)
