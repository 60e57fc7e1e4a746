"""Operations, bound to tensors: one function for each.

    F    input ──stage──▶ output ──detach──▶ what is handed on
           ▲                 │
           leaf              its end of the graph is kept as ACTIVATION
    B    the root and the gradient that arrived ──autograd──▶ leaf.grad, .grad
    I    the same ──autograd──▶ the leaf's gradient, and what W has left to do
    W    that ──autograd──▶ .grad

The output of a stage is detached, and marked as wanting a gradient where the
output did: it is the leaf of the next stage's graph. So each stage has a graph
of its own, and a backward needs nothing but the two ends of it.

What a slice carries on to the next crosses that boundary in the same way: it is
a second output of F(m,q) and a second leaf of F(m,q+1), whose gradient B(m,q+1)
leaves for B(m,q). What goes over a skip connection does likewise: it is one more
output of F(s,m), and one more leaf of F(t,m).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.batch import Value
from pipeproof.exec.engine import backward as run_backward
from pipeproof.exec.errors import LossError, ModelError
from pipeproof.exec.replicas import Run
from pipeproof.exec.rng import generators, key, seed
from pipeproof.exec.selective import Recording
from pipeproof.exec.skips import Values
from pipeproof.exec.split import Root
from pipeproof.exec.stage import Stage
from pipeproof.exec.stash import Stash
from pipeproof.exec.step import Step
from pipeproof.sched import BufferKind, Kind, Op, Program, Schedule
from pipeproof.sched.deps import OpTable
from pipeproof.sched.program import Buffer, Instruction

INPUTS = (BufferKind.INPUT, BufferKind.STORED_INPUT)
OUTPUT, OUTPUT_GRAD = BufferKind.OUTPUT, BufferKind.OUTPUT_GRAD
INPUT_GRAD = BufferKind.INPUT_GRAD

Homes = Mapping[tuple[int, int], Stage]
"""By stage and device of the schedule, the stages that this process runs."""

Forward = Callable[[], tuple[Value, tuple[Any, ...], dict[int, Values]]]
"""Gives an output; for each unit that takes a carry, what it leaves; and what goes
over skip connections, by stage."""

Of = tuple[int, int, int]
"""Stage, micro-batch and slice."""


class Binder:
    """Makes the functions, and holds what they pass to each other.

    Args:
        program: lowered.
        homes: the stages, on their devices.
        loss_fn: (output of the last stage, targets) → scalar.

    Attributes:
        values: of each buffer of the program.
        step: the one under way.
        autocast: whether it runs under autocast.
        stashes: what forwards stored that is offloaded.
    """

    def __init__(
        self, program: Program, homes: Homes, loss_fn: Callable[[Any, Any], Any]
    ) -> None:
        self.program = program
        self.homes = homes
        self.values: list[Any] = [None] * len(program.buffers)
        self.step: Step
        self.autocast = False
        self.stashes: dict[Of, Stash] = {}
        self._loss_fn = loss_fn
        self._sliced = program.schedule.slices > 1
        self._split = program.schedule.has(Kind.I)
        self._carried: dict[Of, tuple[Any, ...]] = {}
        self._carried_grads: dict[Of, list[Tensor | None]] = {}
        self._recordings: dict[Of, Recording] = {}
        self._offloaded = OpTable.of(program.schedule).has(Kind.OFFLOAD)
        inputs = np.flatnonzero(np.isin(program.buffers[:, 0], INPUTS))
        owners = program.buffers[inputs, 2:5].tolist()
        over = np.full(len(inputs), -1)
        if program.schedule.skips:
            over = program.buffer_skips[inputs]
        # Of a reloaded one the last, which its backward reads.
        self._input_of: dict[Of, int] = {}
        self._brought_to: dict[Of, dict[int, int]] = {}
        for of, index, skip in zip(owners, inputs.tolist(), over.tolist()):
            if skip < 0:
                self._input_of[tuple(of)] = index
            else:
                source = program.schedule.skips[skip][0]
                self._brought_to.setdefault(tuple(of), {})[source] = index

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self.values[:] = [None] * len(self.values)
        self.stashes.clear()
        self._carried.clear()
        self._carried_grads.clear()
        self._recordings.clear()
        del self.step

    def bind(self, op: Op, instruction: Instruction) -> Run:
        """What an op does."""
        match op.kind:
            case Kind.F:
                return self._bind_forward(op, instruction)
            case Kind.R:
                return self._bind_recompute(op, instruction)
            case Kind.B:
                return self._bind_backward(op, instruction)
            case Kind.I:
                if self._w_is_next(op, instruction):
                    return self._bind_backward(op, instruction)
                return self._bind_input_grad(op, instruction)
            case Kind.W:
                return self._bind_weight_grad(op, instruction)
        raise AssertionError(f"not bound: {op}")

    def bind_output(self, op: Op, instruction: Instruction) -> Run:
        """What a forward does if no backward follows."""
        values, stage = self.values, self._stage(op, instruction)
        last = op.stage == self.program.schedule.stages - 1
        compute = self._bind_units(op, instruction)
        finish = self._bind_loss(op, stage) if last else stage.checked
        out = _find(instruction.writes, (BufferKind.OUTPUT,), op)
        over = _going(instruction, op)
        brought = _find(instruction.writes, INPUTS, op)
        read = _find(instruction.reads + instruction.writes, INPUTS, op)
        done = [read, *self._brought_to.get(_of(op), {}).values()]

        def forward() -> None:
            if brought >= 0:
                batch = self.step.inputs[op.micro_batch][op.slice]
                values[brought] = tensors.handed_on(batch)
            output, carry, left = compute()
            for buffer in done:
                values[buffer] = None
            self._carried.pop(_of(op), None)
            self._carry_on(op, carry)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target])
            if last:
                self.step.outputs[op.micro_batch, op.slice] = output
            if not last or self.step.with_loss:
                output = finish(output)
            if out >= 0:
                values[out] = tensors.handed_on(output)

        return forward

    def leaves(self, op: Op, instruction: Instruction) -> list[Tensor]:
        """The leaves of the graph that a forward made; an OFFLOAD reads them."""
        read = _find(instruction.reads, INPUTS, op)
        carry = self._carried.get(_of(op), ())
        brought = [self.values[b.index] for b in _coming(instruction, op)]
        leaves = tensors.flat((self.values[read], brought, carry))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _stage(self, op: Op, instruction: Instruction) -> Stage:
        return self.homes[op.stage, instruction.stream.device]

    def _bind_forward(self, op: Op, instruction: Instruction) -> Run:
        values, stage = self.values, self._stage(op, instruction)
        compute = self._bind_stage(op, instruction)
        if self._offloaded[op.micro_batch, op.slice, op.stage]:
            compute = _inside(self._into_stash(op, stage), compute)
        if len(holders(self.program.schedule, op.stage)) > 1:
            compute = _inside(stage.buffers.refusing_changes, compute)
        out = _find(instruction.writes, (BufferKind.OUTPUT,), op)
        stash = _find(instruction.writes, (BufferKind.ACTIVATION,), op)
        over, over_in = _going(instruction, op), _coming(instruction, op)
        brought = _find(instruction.writes, INPUTS, op)
        read = _find(instruction.reads + instruction.writes, INPUTS, op)

        def bring_in() -> None:
            """The first stage's F brings its own input in."""
            batch = self.step.inputs[op.micro_batch][op.slice]
            values[brought] = tensors.handed_on(batch)

        def keep() -> None:
            if brought >= 0:
                bring_in()
            values[stash] = graph()

        def graph() -> tuple[Any, Any, Any]:
            """Where its backward starts."""
            output, carry, left = compute()
            carried = carry and self._carry_on(op, carry)
            if out >= 0:
                values[out] = tensors.handed_on(output)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target])
            return tensors.root(output), carried, left and tensors.root(left)

        def keep_some() -> None:
            """For an R that runs only some units again."""
            if brought >= 0:
                bring_in()
            assert stage.selection is not None
            recording = stage.selection.recording(_of(op))
            self._recordings[_of(op)] = recording
            recording.end(graph())

        def forget() -> None:
            if brought >= 0:
                bring_in()
            with torch.no_grad(), stage.buffers.noting_changes(_of(op)):
                output, carry, left = compute()
            if self.autocast:
                # Casts of weights made here have no graph; cached, they would
                # cut the weights off from every later forward.
                torch.clear_autocast_cache()
            came = [values[buffer.index] for buffer in over_in]
            leaves = values[read], came, self._carried.get(_of(op), ())
            wants_grad = stage.trains or tensors.wants_grad(leaves)
            self._carry_on(op, carry, wants_grad)
            if out >= 0:
                values[out] = tensors.handed_on(output, wants_grad)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target], wants_grad)

        if stash >= 0:
            return keep
        return forget if stage.selection is None else keep_some

    def _bind_recompute(self, op: Op, instruction: Instruction) -> Run:
        values, stage = self.values, self._stage(op, instruction)
        compute = self._bind_stage(op, instruction)
        stash = _find(instruction.writes, (BufferKind.ACTIVATION,), op)

        def recompute() -> None:
            with stage.buffers.rewound(_of(op)):
                output, carry, left = compute()
            roots = left and tensors.root(left)
            values[stash] = tensors.root(output), self._roots(op, carry), roots

        def recompute_some() -> None:
            again, step = self._recordings.pop(_of(op)), self.step
            values[stash] = again.run_again(step.seed, op.micro_batch, op.slice)

        return recompute if stage.selection is None else recompute_some

    def _bind_stage(self, op: Op, instruction: Instruction) -> Forward:
        """From the stage's input to its output (of the last, the loss) and carry."""
        stage = self._stage(op, instruction)
        units = self._bind_units(op, instruction)
        last = op.stage == self.program.schedule.stages - 1
        finish = self._bind_loss(op, stage) if last else stage.checked

        def compute() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
            output, carry, left = units()
            return finish(output), carry, left

        return _inside(stage.splitter.watching, compute) if self._split else compute

    def _bind_units(self, op: Op, instruction: Instruction) -> Forward:
        """From the stage's input to what its units make of it, and carry."""
        values, stage = self.values, self._stage(op, instruction)
        read = _find(instruction.reads + instruction.writes, INPUTS, op)
        of, micro_batch, part = _of(op), op.micro_batch, op.slice
        sliced, first = self._sliced, ((),) * stage.carries
        over = [buffer.index for buffer in _coming(instruction, op)]

        def compute() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
            value, step = values[read], self.step
            carry = self._carried.get(of, first) if sliced else None
            came: Values = {}
            for buffer in over:
                came |= values[buffer]
            leaves = value if carry is None and not came else (value, came, carry)
            before = tensors.versions(leaves)
            output, left, gone = stage.run(
                value,
                step.seed,
                micro_batch,
                part,
                carry,
                step.keywords_at(stage.device, micro_batch, part),
                came,
                self._recordings.get(of),
            )
            if tensors.versions(leaves) != before:
                raise ModelError(_in_place(op, leaves, before))
            return output, left, gone

        return compute

    def _bind_loss(self, op: Op, stage: Stage) -> Callable[[Any], Tensor]:
        sources = generators(stage.device)
        unit = stage.first_unit + len(stage.units)
        micro_batch, part = op.micro_batch, op.slice

        def loss(output: Any) -> Tensor:
            step = self.step
            seed(sources, key(step.seed, unit, micro_batch, part))
            found = self._loss_fn(output, step.targets[micro_batch][part])
            return step.scaled(found, micro_batch, part)

        return loss

    def _into_stash(self, op: Op, stage: Stage) -> Callable[[], Any]:
        """The context of a forward that is offloaded: autograd saves into a stash."""

        def saving() -> Any:
            stash = self.stashes[_of(op)] = Stash(stage.device, stage.staying)
            return stash.saving()

        return saving

    def _carry_on(
        self, op: Op, carry: tuple[Any, ...], wants_grad: bool | None = None
    ) -> Any:
        """Give the next slice its leaves, and keep where their gradients go."""
        if not carry or op.slice == self.program.schedule.slices - 1:
            return ()
        following = op.stage, op.micro_batch, op.slice + 1
        self._carried[following] = tensors.handed_on(carry, wants_grad)
        return self._roots(op, carry)

    def _roots(self, op: Op, carry: tuple[Any, ...]) -> Any:
        if op.slice == self.program.schedule.slices - 1:
            return ()
        return tensors.root(carry)

    def _bind_ends(
        self, op: Op, instruction: Instruction
    ) -> Callable[[], tuple[list[Root], list[Tensor]]]:
        """Where the backward starts: at the output, and at what was carried on."""
        values = self.values
        stash = _find(instruction.reads, (BufferKind.ACTIVATION,), op)
        arrived = _find(instruction.reads, (BufferKind.OUTPUT_GRAD,), op)
        over = [
            (buffer.skip[1], buffer.index)
            for buffer in instruction.reads
            if buffer.skip and buffer.kind == OUTPUT_GRAD and _belongs(buffer, op)
        ]
        last = op.stage == self.program.schedule.stages - 1
        following = op.stage, op.micro_batch, op.slice + 1

        def ends() -> tuple[list[Root], list[Tensor]]:
            root, carried, left = values[stash]
            if last:
                gradient = None if root is None else torch.ones_like(root)
            else:
                gradient = values[arrived]
            roots, gradients = tensors.ends(root, gradient)
            if carried:
                grads = self._carried_grads.pop(following)
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
        if self.step.factors[op.micro_batch][op.slice] != 0:
            raise LossError(
                f"micro-batch {op.micro_batch}: the loss depends on nothing that "
                "requires a gradient"
            )

    def _bind_backward(self, op: Op, instruction: Instruction) -> Run:
        ends = self._bind_ends(op, instruction)
        pass_on = self._bind_passing(op, instruction)
        of, read = _of(op), self._input_of[_of(op)]
        over = list(self._brought_to.get(of, {}).values())
        values, carried = self.values, self._carried

        def backward() -> None:
            roots, gradients = ends()
            if roots:
                run_backward(roots, gradients)
            carry = tensors.grads(carried[of]) if of in carried else ()
            came = [tensors.grads(values[buffer]) for buffer in over]
            pass_on(tensors.grads(values[read]), carry, came)

        return backward

    def _bind_input_grad(self, op: Op, instruction: Instruction) -> Run:
        """I: as B, but for what is left to W."""
        values, splitter = self.values, self._stage(op, instruction).splitter
        ends = self._bind_ends(op, instruction)
        pass_on = self._bind_passing(op, instruction)
        rest = _find(instruction.writes, (BufferKind.WEIGHT_STASH,), op)
        of, read = _of(op), self._input_of[_of(op)]
        over = list(self._brought_to.get(of, {}).values())

        def input_grad() -> None:
            roots, gradients = ends()
            value, carry = values[read], self._carried.get(of, ())
            came = [values[buffer] for buffer in over]
            found: list[Tensor | None] = []
            leaves = tensors.learning((value, carry, came))
            if roots:
                found, values[rest] = splitter.input_grads(roots, gradients, leaves)
            by_leaf = iter(found or [None] * len(leaves))
            pass_on(*(tensors.like(of, by_leaf) for of in (value, carry, came)))

        return input_grad

    def _bind_passing(
        self, op: Op, instruction: Instruction
    ) -> Callable[[Any, Any, Any], None]:
        """Pass on the gradients of what the stage got; free what is done with."""
        values = self.values
        passed = _find(instruction.writes, (BufferKind.INPUT_GRAD,), op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]
        first, of, read = op.stage == 0, _of(op), self._input_of[_of(op)]
        back = {
            buffer.skip[0]: buffer.index
            for buffer in instruction.writes
            if buffer.skip and buffer.kind == INPUT_GRAD and _belongs(buffer, op)
        }
        over = [back[source] for source in self._brought_to.get(of, {})]

        def pass_on(gradient: Any, carried: Any, came: Any) -> None:
            if passed >= 0:
                values[passed] = gradient
            elif first and gradient is not None and tensors.wants_grad(values[read]):
                self.step.input_grads[op.micro_batch, op.slice] = gradient
            for buffer, grads in zip(over, came):
                values[buffer] = grads
            if of in self._carried:
                del self._carried[of]
                self._carried_grads[of] = tensors.flat(carried)
            for buffer in frees:
                values[buffer] = None

        return pass_on

    def _bind_weight_grad(self, op: Op, instruction: Instruction) -> Run:
        values = self.values
        rest = _find(instruction.reads, (BufferKind.WEIGHT_STASH,), op)
        frees = [b.index for b in instruction.frees if _belongs(b, op)]

        def weight_grad() -> None:
            if values[rest] is not None:  # else I was B
                values[rest].run()
            for buffer in frees:
                values[buffer] = None

        return weight_grad

    def _w_is_next(self, op: Op, instruction: Instruction) -> bool:
        """Whether an I stands alone, and its own W alone behind it.

        In an overlap group another W may stand between the two, and come first.
        """
        stream = self.program.by_stream[self.program.stream[instruction.index]]
        place = int(np.searchsorted(stream, instruction.index)) + 1
        if len(instruction.ops) > 1 or place == len(stream):
            return False
        return self.program[int(stream[place])].ops == (op._replace(kind=Kind.W),)


def _inside(context: Callable[[], Any], compute: Forward) -> Forward:
    def inside() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
        with context():
            return compute()

    return inside


def holders(schedule: Schedule, stage: int) -> list[int]:
    """The devices that hold a stage, in ascending order."""
    return sorted({pipe[stage] for pipe in schedule.placement.pipes})


def _in_place(op: Op, leaves: Any, before: Any) -> str:
    """Which of its leaves a stage has changed: input, what skips brought, carry."""
    parts = [leaves] if isinstance(before, int) else list(leaves)
    was = iter([before] if isinstance(before, int) else before)
    changed = [
        [next(was) for _ in found] != found
        for found in (tensors.versions((part,)) for part in parts)
    ]
    source = f"stage {op.stage - 1}'s output" if op.stage else "the batch"
    what = f"input in place, which is {source}"
    if not changed[0]:
        what = "carry in place, which is what an earlier slice left"
        if len(changed) == 3 and changed[1]:
            what = "skips in place, which is what earlier stages gave"
    return (
        f"stage {op.stage} changes its {what}: make its first operation work out of "
        "place"
    )


def _of(op: Op) -> Of:
    return op.stage, op.micro_batch, op.slice


def _belongs(buffer: Buffer, op: Op) -> bool:
    return (buffer.stage, buffer.micro_batch, buffer.slice) == _of(op)


def _find(buffers: Sequence[Buffer], kinds: Sequence[BufferKind], op: Op) -> int:
    """The op's own buffer of one of these kinds; -1 where there is none."""
    for buffer in buffers:
        if buffer.kind in kinds and buffer.skip is None and _belongs(buffer, op):
            return buffer.index
    return -1


def _going(instruction: Instruction, op: Op) -> list[tuple[int, int]]:
    """The stages that a forward gives to over skips, and the buffers."""
    return [
        (buffer.skip[1], buffer.index)
        for buffer in instruction.writes
        if buffer.skip and buffer.kind == OUTPUT and _belongs(buffer, op)
    ]


def _coming(instruction: Instruction, op: Op) -> list[Buffer]:
    """The buffers in which an op finds what came over skips."""
    return [
        buffer
        for buffer in instruction.reads
        if buffer.skip and buffer.kind in INPUTS and _belongs(buffer, op)
    ]
