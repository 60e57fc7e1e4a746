"""`check_finite`: the first op whose loss, output or gradient is not finite.

NaN spreads: behind the op that made it every output, the batch's loss and every
gradient have it, and none of these says where it began. So each op is followed by a
look at what it alone made::

    F       the loss, or what the next stage gets
    B, I    what the stage before gets, and the stage's gradients so far
    W       the stage's gradients so far

A look waits for the device, which is why none is taken unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeproof.exec import tensors
from pipeproof.exec.errors import StepError
from pipeproof.exec.replicas import Run
from pipeproof.exec.stage import Stage
from pipeproof.exec.workspace import Workspace, belongs
from pipeproof.sched import BufferKind, Kind, Op
from pipeproof.sched.instructions import Instruction


def looked_at(
    run: Run, op: Op, instruction: Instruction, stage: Stage, space: Workspace
) -> Run:
    """An op, and behind it the look at what it made.

    With a scaler losses and outputs only: overflows of gradients are its business.

    Args:
        run: what the op does.
        op: an F, B, I or W; others make nothing new.
        instruction: that it is part of.
        stage: on the op's device.
        space: whose values it leaves.

    Raises:
        StepError: out of the function that is returned, naming op and tensor.
    """
    made = [
        buffer.index
        for buffer in instruction.writes
        if buffer.kind in (BufferKind.OUTPUT, BufferKind.INPUT_GRAD)
        and belongs(buffer, op)
    ]
    last = op.stage == space.program.schedule.stages - 1

    def forward() -> None:
        run()
        for buffer in made:
            _look("the output", op, tensors.flat(space.values[buffer]))
        if last:
            _look("the loss", op, [space.step.losses[op.micro_batch, op.slice]])

    def backward() -> None:
        run()
        if space.step.scaler is not None:
            return
        for buffer in made:
            _look("the gradient of the input", op, tensors.flat(space.values[buffer]))
        if op.stage == 0:
            given = space.step.input_grads.get((op.micro_batch, op.slice))
            _look("the gradient of the input", op, tensors.flat(given))
        for parameter in stage.parameters:
            what = f"the gradient of a parameter of shape {tuple(parameter.shape)}"
            _look(what, op, [parameter.grad])

    if op.kind == Kind.F:
        return forward
    return backward if op.kind in (Kind.B, Kind.I, Kind.W) else run


def check_before(stages: Iterable[Stage]) -> None:
    """Refuse gradients that a step would add to, and then be blamed for.

    Raises:
        StepError: naming the stage.
    """
    for stage in stages:
        for parameter in stage.original.parameters:
            if found := _not_finite(parameter.grad):
                raise StepError(
                    f"before the step, the gradient of a parameter of shape "
                    f"{tuple(parameter.shape)} of stage {stage.number} is not finite, "
                    f"{found}: zero it first"
                )


def _look(what: str, op: Op, made: Iterable[Any]) -> None:
    for value in made:
        if found := _not_finite(value):
            raise StepError(
                f"{what} is first not finite at {op}, stage {op.stage}, micro-batch "
                f"{op.micro_batch}: {found}"
            )


def _not_finite(value: Any) -> str:
    """How many numbers are not, in words; empty if all are. Of a shard, those here."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    if isinstance(value, float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or bool(torch.isfinite(value).all()):
        return ""
    nans, infinite = int(value.isnan().sum()), int(value.isinf().sum())
    return f"{nans:,} NaN and {infinite:,} infinite of {value.numel():,}"
