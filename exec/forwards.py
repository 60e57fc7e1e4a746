"""F and R, bound to tensors: from a stage's input to the end of its graph.

    F    input ──stage──▶ output ──detach──▶ what is handed on
           ▲                 │
           leaf              its end of the graph is kept as ACTIVATION

What a slice carries on to the next, and what goes over a skip connection, are further
outputs and further leaves, and cross in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.batch import Value
from pipeproof.exec.errors import ModelError
from pipeproof.exec.homes import holders
from pipeproof.exec.replicas import Run
from pipeproof.exec.rng import generators, key, seed
from pipeproof.exec.skips import Values
from pipeproof.exec.stage import Stage
from pipeproof.exec.stash import Stash
from pipeproof.exec.workspace import INPUTS, Workspace, coming, find, going, of
from pipeproof.sched import BufferKind, Kind, Op
from pipeproof.sched.deps import OpTable
from pipeproof.sched.instructions import Instruction

Forward = Callable[[], tuple[Value, tuple[Any, ...], dict[int, Values]]]
"""Gives an output; for each unit that takes a carry, what it leaves; and what goes
over skip connections, by stage."""


class Forwards:
    """Binds them.

    Args:
        space: that they share with backwards.
        loss_fn: (output of the last stage, targets) → scalar.
    """

    def __init__(self, space: Workspace, loss_fn: Callable[[Any, Any], Any]) -> None:
        self._space, self._loss_fn = space, loss_fn
        self._schedule = schedule = space.program.schedule
        self._sliced = schedule.slices > 1
        self._split = schedule.has(Kind.I)
        self._offloaded = OpTable.of(schedule).has(Kind.OFFLOAD)

    def bind(self, op: Op, instruction: Instruction) -> Run:
        """What an F does."""
        space = self._space
        values, stage = space.values, space.stage(op, instruction)
        compute = self._bind_stage(op, instruction)
        if self._offloaded[op.micro_batch, op.slice, op.stage]:
            compute = _inside(self._into_stash(op, stage), compute)
        if len(holders(self._schedule, op.stage)) > 1:
            compute = _inside(stage.buffers.refusing_changes, compute)
        out = find(instruction.writes, (BufferKind.OUTPUT,), op)
        stash = find(instruction.writes, (BufferKind.ACTIVATION,), op)
        over, over_in = going(instruction, op), coming(instruction, op)
        bring_in = self._bind_bringing_in(op, instruction)
        read = find(instruction.reads + instruction.writes, INPUTS, op)

        def keep() -> None:
            if bring_in is not None:
                bring_in()
            values[stash] = graph()

        def graph() -> tuple[Any, Any, Any]:
            """Where its backward starts."""
            output, carry, left = stage.buffers.keeping_graph(compute)
            carried = carry and self._carry_on(op, carry)
            if out >= 0:
                values[out] = tensors.handed_on(output)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target])
            return tensors.root(output), carried, left and tensors.root(left)

        def keep_some() -> None:
            """For an R that runs only some units again."""
            if bring_in is not None:
                bring_in()
            assert stage.selection is not None
            recording = stage.selection.recording(of(op))
            space.recordings[of(op)] = recording
            recording.end(graph())

        def forget() -> None:
            if bring_in is not None:
                bring_in()
            try:
                with torch.no_grad(), stage.buffers.noting_changes(of(op)):
                    output, carry, left = compute()
            except RuntimeError as error:
                if "does not require grad and does not have" not in str(error):
                    raise
                raise ModelError(
                    f"stage {op.stage} asks for gradients in its forward, which makes "
                    "no graph where an R runs it again: do that within "
                    "torch.enable_grad(), or do not recompute the stage"
                ) from error
            if space.autocast:
                # Casts of weights made here have no graph; cached, they would
                # cut the weights off from every later forward.
                torch.clear_autocast_cache()
            came = [values[buffer.index] for buffer in over_in]
            leaves = values[read], came, space.carried.get(of(op), ())
            wants_grad = stage.trains or tensors.wants_grad(leaves)
            self._carry_on(op, carry, wants_grad)
            if out >= 0:
                values[out] = tensors.handed_on(output, wants_grad)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target], wants_grad)

        if stash >= 0:
            return keep
        return forget if stage.selection is None else keep_some

    def bind_recompute(self, op: Op, instruction: Instruction) -> Run:
        """What an R does."""
        space = self._space
        values, stage = space.values, space.stage(op, instruction)
        compute = self._bind_stage(op, instruction)
        stash = find(instruction.writes, (BufferKind.ACTIVATION,), op)

        def recompute() -> None:
            with stage.buffers.rewound(of(op)):
                output, carry, left = compute()
            roots = left and tensors.root(left)
            values[stash] = tensors.root(output), self._roots(op, carry), roots

        def recompute_some() -> None:
            again, step = space.recordings.pop(of(op)), space.step
            values[stash] = again.run_again(step.seed, op.micro_batch, op.slice)

        return recompute if stage.selection is None else recompute_some

    def bind_output(self, op: Op, instruction: Instruction) -> Run:
        """What an F does if no backward follows."""
        space = self._space
        values, stage = space.values, space.stage(op, instruction)
        last = op.stage == self._schedule.stages - 1
        compute = self._bind_units(op, instruction)
        finish = self._bind_loss(op, stage) if last else stage.checked
        out = find(instruction.writes, (BufferKind.OUTPUT,), op)
        over = going(instruction, op)
        bring_in = self._bind_bringing_in(op, instruction)
        read = find(instruction.reads + instruction.writes, INPUTS, op)
        done = [read, *space.brought_to.get(of(op), {}).values()]

        def forward() -> None:
            if bring_in is not None:
                bring_in()
            output, carry, left = compute()
            for buffer in done:
                values[buffer] = None
            space.carried.pop(of(op), None)
            self._carry_on(op, carry)
            for target, buffer in over:
                values[buffer] = tensors.handed_on(left[target])
            if last:
                space.step.outputs[op.micro_batch, op.slice] = output
            if not last or space.step.with_loss:
                output = finish(output)
            if out >= 0:
                values[out] = tensors.handed_on(output)

        return forward

    def _bind_bringing_in(self, op: Op, instruction: Instruction) -> Run | None:
        """The first stage's F brings its own input in."""
        space, values = self._space, self._space.values
        brought = find(instruction.writes, INPUTS, op)
        micro_batch, part = op.micro_batch, op.slice

        def bring_in() -> None:
            values[brought] = tensors.handed_on(space.step.inputs[micro_batch][part])

        return bring_in if brought >= 0 else None

    def _bind_stage(self, op: Op, instruction: Instruction) -> Forward:
        """From the stage's input to its output (of the last, the loss) and carry."""
        stage = self._space.stage(op, instruction)
        units = self._bind_units(op, instruction)
        last = op.stage == self._schedule.stages - 1
        finish = self._bind_loss(op, stage) if last else stage.checked

        def compute() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
            output, carry, left = units()
            return finish(output), carry, left

        return _inside(stage.splitter.watching, compute) if self._split else compute

    def _bind_units(self, op: Op, instruction: Instruction) -> Forward:
        """From the stage's input to what its units make of it, and carry."""
        space = self._space
        values, stage = space.values, space.stage(op, instruction)
        read = find(instruction.reads + instruction.writes, INPUTS, op)
        where, micro_batch, part = of(op), op.micro_batch, op.slice
        sliced, first = self._sliced, ((),) * stage.carries
        over = [buffer.index for buffer in coming(instruction, op)]
        recordings = space.recordings if stage.selection is not None else {}

        def compute() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
            value, step = values[read], space.step
            carry = space.carried.get(where, first) if sliced else None
            came: Values = {}
            for buffer in over:
                came |= values[buffer]
            leaves = value if carry is None and not came else (value, came, carry)
            before = tensors.versions(leaves)
            try:
                found = stage.run(
                    value,
                    step.seed,
                    micro_batch,
                    part,
                    carry,
                    step.keywords_at(stage.device, micro_batch, part),
                    came,
                    recordings.get(where) if recordings else None,
                )
            except RuntimeError as error:
                # Autograd itself refuses to change a leaf.
                if "leaf Variable that requires grad" not in str(error):
                    raise
                raise ModelError(_in_place(op, leaves, before)) from error
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ModelError(
                    f"stage {op.stage} normalises each micro-batch by itself, and "
                    f"micro-batch {micro_batch} has one number in a channel: give it "
                    "more rows, or use a schedule with fewer micro-batches"
                ) from error
            if tensors.versions(leaves) != before:
                raise ModelError(_in_place(op, leaves, before))
            return found

        return compute

    def _bind_loss(self, op: Op, stage: Stage) -> Callable[[Any], Tensor]:
        space, sources = self._space, generators(stage.device)
        unit = stage.first_unit + len(stage.units)
        micro_batch, part = op.micro_batch, op.slice

        def loss(output: Any) -> Tensor:
            step = space.step
            seed(sources, key(step.seed, unit, micro_batch, part))
            found = self._loss_fn(output, step.targets[micro_batch][part])
            return step.scaled(found, micro_batch, part)

        return loss

    def _into_stash(self, op: Op, stage: Stage) -> Callable[[], Any]:
        """The context of a forward that is offloaded: autograd saves into a stash."""
        stashes = self._space.stashes

        def saving() -> Any:
            stash = stashes[of(op)] = Stash(stage.device, stage.staying)
            return stash.saving()

        return saving

    def _carry_on(
        self, op: Op, carry: tuple[Any, ...], wants_grad: bool | None = None
    ) -> Any:
        """Give the next slice its leaves, and keep where their gradients go."""
        if not carry or op.slice == self._schedule.slices - 1:
            return ()
        following = op.stage, op.micro_batch, op.slice + 1
        self._space.carried[following] = tensors.handed_on(carry, wants_grad)
        return self._roots(op, carry)

    def _roots(self, op: Op, carry: tuple[Any, ...]) -> Any:
        if op.slice == self._schedule.slices - 1:
            return ()
        return tensors.root(carry)


def _inside(context: Callable[[], Any], compute: Forward) -> Forward:
    def inside() -> tuple[Value, tuple[Any, ...], dict[int, Values]]:
        with context():
            return compute()

    return inside


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
    if any(changed[1:]) and not changed[0]:
        what = "carry in place, which is what an earlier slice left"
        if len(changed) == 3 and changed[1]:
            what = "skips in place, which is what earlier stages gave"
    return (
        f"stage {op.stage} changes its {what}: make its first operation work out of "
        "place"
    )
