"""The gradient that every schedule must give, from an unpipelined model.

Independent of the executor: it calls the units one after the other on whole
micro-batches and lets autograd do the rest. It shares only the keys of the
randomness, and the weights of the losses, since those define the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeproof.exec.batch import LossScale, Value, check_scale, factors, split
from pipeproof.exec.rng import generators, key, seed, step_seed
from pipeproof.exec.runtime import LossFn
from pipeproof.exec.stage import StageModule, units_of
from pipeproof.sched import Kind, Schedule


def reference(
    stages: Sequence[StageModule] | nn.Sequential,
    schedule: Schedule,
    loss_fn: LossFn,
    inputs: Value,
    targets: Value,
    *,
    loss_scale: LossScale = "rows",
) -> Tensor:
    """A plain loop over micro-batches, with the schedule's order of summation.

    Each micro-batch goes forward and backward through the whole model at once.
    Each parameter's gradients are then added up in the order in which the
    schedule runs its stage's backwards. For a schedule with one order on all
    stages this is a loop of `loss.backward()`; `Pipeline.step` equals it bit by
    bit. The forwards run in the order of the first stage's, which is what decides
    running statistics.

    Args:
        stages: as for `Pipeline`, all on one device; pass a deep copy of those
            that are pipelined.
        schedule: gives micro-batches and orders.
        loss_fn: as for `Pipeline`.
        inputs: as for `Pipeline.step`.
        targets: likewise.
        loss_scale: as for `Pipeline`.

    Returns:
        The batch's loss, a detached scalar. Gradients are added to `.grad`.

    Raises:
        ParameterError, BatchError, LossError: as `Pipeline`.
    """
    check_scale(loss_scale)
    schedule.report.raise_if_bad()
    batch = split("inputs", inputs, schedule.micro_batches)
    labels = split("targets", targets, schedule.micro_batches)
    scale = factors(batch, labels, loss_scale)
    units = [unit for stage in stages for unit in units_of(stage)]
    owners = _owners(stages)
    parameters = [parameter for parameter, _ in owners]
    order = _backward_order(schedule)
    device = parameters[0].device if parameters else torch.device("cpu")
    losses: dict[int, Tensor] = {}
    grads: dict[int, tuple[Tensor | None, ...]] = {}
    with torch.enable_grad(), step_seed([device]) as step:
        sources = generators(device)
        for micro_batch in _forward_order(schedule):
            value = batch[micro_batch]
            for number, unit in enumerate(units):
                seed(sources, key(step, number, micro_batch))
                value = unit(value)
            seed(sources, key(step, len(units), micro_batch))
            loss = loss_fn(value, labels[micro_batch])
            factor = scale[micro_batch]
            if factor == 0:  # does not count, whatever it is
                losses[micro_batch] = torch.zeros_like(loss.detach())
                grads[micro_batch] = (None,) * len(parameters)
                continue
            if factor is not None:
                loss = loss * factor
            losses[micro_batch] = loss.detach()
            grads[micro_batch] = torch.autograd.grad(
                loss, parameters, allow_unused=True
            )
    for number, (parameter, stage) in enumerate(owners):
        for micro_batch in order[stage]:
            _accumulate(parameter, grads[micro_batch][number])
    total = losses[0].clone()
    for micro_batch in range(1, schedule.micro_batches):
        total += losses[micro_batch]
    return total


def _owners(stages: Sequence[StageModule] | nn.Sequential) -> list[tuple[Tensor, int]]:
    """Every parameter that wants a gradient, once, with the last stage it is in.

    The last stage's backward comes first, so it decides a shared one's order.
    """
    owners: dict[int, tuple[Tensor, int]] = {}
    for number, stage in enumerate(stages):
        for unit in units_of(stage):
            for parameter in unit.parameters():
                if parameter.requires_grad:
                    owners[id(parameter)] = parameter, number
    return list(owners.values())


def _forward_order(schedule: Schedule) -> list[int]:
    device = schedule.placement.pipes[0][0]
    row = schedule.row(device)
    first = [op for op in row if op.kind == Kind.F and op.stage == 0]
    return [op.micro_batch for op in first]


def _backward_order(schedule: Schedule) -> list[list[int]]:
    orders: list[list[int]] = [[] for _ in range(schedule.stages)]
    for op in schedule.ops:
        if op.kind in (Kind.B, Kind.W):
            orders[op.stage].append(op.micro_batch)
    return orders


def _accumulate(parameter: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if parameter.grad is None:
        parameter.grad = grad.detach().clone()
    else:
        parameter.grad += grad
