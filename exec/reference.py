"""The gradient that every schedule must give, from an unpipelined model.

Independent of the executor: it calls the units one after the other on whole
micro-batches and lets autograd do the rest. It shares only the keys of the
randomness, and the weights of the losses, since those define the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeproof.exec.batch import (
    NO_KEYWORDS,
    LossFn,
    LossScale,
    Value,
    check_pairs,
    check_scale,
    factors,
    no_targets,
    no_unit_takes,
    size_of,
    split,
    split_keywords,
)
from pipeproof.exec.batch_norm import deferred
from pipeproof.exec.errors import BatchError
from pipeproof.exec.losses import Loss
from pipeproof.exec.rng import generators, key, of_replica, seed, step_seed
from pipeproof.exec.skips import Routes, gives_of, handed_over
from pipeproof.exec.tensors import mapped
from pipeproof.exec.units import (
    StageModule,
    check_sliced,
    keywords_of,
    offers_of,
    takes_carry,
    takes_of,
    units_of,
)
from pipeproof.sched import Kind, Schedule

Gradients = list[Tensor | None]
"""Of each parameter."""


def reference(
    stages: Sequence[StageModule] | nn.Sequential,
    schedule: Schedule,
    loss_fn: LossFn | None,
    inputs: Value,
    targets: Value | None = None,
    *,
    loss_scale: LossScale = "rows",
    keywords: Mapping[str, Any] = NO_KEYWORDS,
    replica: int = 0,
) -> Tensor:
    """A plain loop over micro-batches, with the schedule's order of summation.

    Each micro-batch goes forward and backward through the whole model at once; one
    in slices goes forward slice by slice and backward from the last slice to the
    first. Each parameter's gradients are then added up in the order in which the
    schedule runs its stage's backwards. For a schedule with one order on all
    stages this is a loop of `loss.backward()`; `Pipeline.step` equals it bit by
    bit. Where several devices hold a stage, each one's are added up so, then these
    sums in the order of the devices; where several stages share a parameter, each
    stage's, then these sums in the order of the stages whose first device is the same,
    and of these devices. The forwards run in the order of the first stage's, which is
    what decides running statistics.

    Args:
        stages: as for `Pipeline`, all on one device; pass a deep copy of those
            that are pipelined.
        schedule: gives micro-batches and orders.
        loss_fn: as for `Pipeline`.
        inputs: as for `Pipeline.step`.
        targets: likewise.
        loss_scale: as for `Pipeline`.
        keywords: as for `Pipeline.step`.
        replica: with data parallelism, whose randomness. What a replica adds to
            the gradient is that of its own rows with losses that sum to its share;
            the gradient is the sum of these in the order of the replicas.

    Returns:
        The batch's loss, a detached scalar. Gradients are added to `.grad`.

    Raises:
        ParameterError, BatchError, LossError: as `Pipeline`.
    """
    check_scale(loss_scale)
    schedule.report.raise_if_bad()
    parts = schedule.micro_batches, schedule.slices
    made = Loss.of(loss_fn)
    made.check(targets)
    batch = [list(map(_begun, of)) for of in split("inputs", inputs, *parts)]
    if targets is None:
        size, labels = size_of("inputs", inputs, parts[1]), no_targets(*parts)
    else:
        size = check_pairs(inputs, targets, parts[1])
        labels = split("targets", targets, *parts)
    scale = factors(labels, loss_scale, *size)
    units = [unit for stage in stages for unit in units_of(stage)]
    routes = Routes.of([offers_of(stage) for stage in stages])
    routes.onto(schedule)
    further = split_keywords(keywords, *size, parts)
    taken = frozenset[str]().union(
        *(
            keywords_of(unit) - routes.parameters(takes_of(unit)).keys()
            for unit in units
        )
    )
    if unknown := sorted(keywords.keys() - taken):
        raise BatchError(no_unit_takes(unknown, taken))
    if schedule.slices > 1:
        check_sliced(units)
    where = [n for n, stage in enumerate(stages) for _ in units_of(stage)]
    norms = deferred(module for unit in units for module in unit.modules())
    for norm in norms:
        norm.forget()
    uses = _uses(stages)
    leaves = [use.leaf for use in uses]
    device = leaves[0].device if leaves else torch.device("cpu")
    own = _own_leaves(stages, uses)
    losses: dict[int, list[Tensor]] = {}
    grads: dict[tuple[int, int], Gradients] = {}
    sources = generators(device)
    with torch.enable_grad(), step_seed(sources) as seed_of_all:
        step = of_replica(seed_of_all, replica)
        for number in _forward_order(schedule):
            one = _MicroBatch(
                units,
                own,
                made.call,
                sources,
                step,
                number,
                further[number],
                where,
                routes,
            )
            losses[number] = one.forward(batch[number], labels[number], scale[number])
            for part, found in enumerate(one.backward(leaves)):
                grads[number, part] = found
    for norm in norms:
        norm.move()
    _add_up(uses, schedule, grads)
    total = losses[0][0].clone()
    for loss in [loss for number in sorted(losses) for loss in losses[number]][1:]:
        total += loss
    return total


class _MicroBatch:
    """One micro-batch, forward and backward through the whole model.

    Args:
        units: of the model.
        own: for each, the leaves that stand for its parameters, by name.
        loss_fn: as for `Pipeline`.
        sources: generators to seed.
        step: the step's seed.
        number: of the micro-batch.
        keywords: of its slices.
        stages: of each unit.
        routes: of skip connections.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        own: Sequence[dict[str, Tensor]],
        loss_fn: Callable[[Any, Any], Any],
        sources: Sequence[torch.Generator],
        step: int,
        number: int,
        keywords: list[dict[str, Any]],
        stages: list[int],
        routes: Routes,
    ) -> None:
        self._stages, self._routes = stages, routes
        self._units, self._own, self._loss_fn = units, own, loss_fn
        self._step, self._number = step, number
        self._sources, self._keywords = sources, keywords
        self._slices: list[tuple[Tensor | None, list[Tensor], list[Tensor]]] = []

    def forward(
        self, inputs: list[Value], targets: list[Value], scale: list[float | None]
    ) -> list[Tensor]:
        """Slice by slice; the losses with their factors."""
        losses: list[Tensor] = []
        carry: dict[int, Any] | None = {} if len(inputs) > 1 else None
        for part, value in enumerate(inputs):
            output, left = self._through(value, part, carry)
            self._seed(len(self._units), part)
            loss, factor = self._loss_fn(output, targets[part]), scale[part]
            if factor == 0:  # does not count, whatever it is
                loss = torch.zeros_like(loss.detach())
            elif factor is not None:
                loss = loss * factor
            losses.append(loss.detach())
            end = None if factor == 0 else loss
            self._slices.append((end, _tensors(left), _tensors(carry)))
            if carry is not None:
                carry = {unit: _leaves(carried) for unit, carried in left.items()}
        return losses

    def _through(
        self, value: Value, part: int, carry: dict[int, Any] | None
    ) -> tuple[Value, dict[int, Any]]:
        """The model on one slice: its output, and what each unit carries on."""
        left: dict[int, Any] = {}
        named: dict[tuple[str, int], Any] = {}  # a skip, and the stage that takes it
        for number, unit in enumerate(self._units):
            self._seed(number, part)
            names, stage = keywords_of(unit), self._stages[number]
            given = {
                n: self._keywords[part][n] for n in names if n in self._keywords[part]
            }
            takes = self._routes.parameters(takes_of(unit))
            given |= {own: named[name, stage] for own, name in takes.items()}
            inputs: tuple[Any, ...] = (value,)
            if carry is not None and takes_carry(unit):
                inputs = value, carry.get(number, ())
            if own := self._own[number]:
                value = functional_call(unit, own, inputs, given)
            else:
                value = unit(*inputs, **given)
            if len(inputs) > 1:
                value, carried = value
                left[number] = _aside(carried)
            if gives := gives_of(unit):
                value, made = value
                for name in gives:
                    for target in self._routes.targets[name]:
                        named[name, target] = handed_over(made[name])
        return value, left

    def _seed(self, unit: int, part: int) -> None:
        seed(self._sources, key(self._step, unit, self._number, part))

    def backward(self, parameters: Sequence[Tensor]) -> list[Gradients]:
        """Of each slice, the gradients of these; from the last slice to the first."""
        found: list[Gradients] = []
        arrived: list[Tensor | None] = []
        for loss, carried, leaves in reversed(self._slices):
            pairs: list[tuple[Tensor, Tensor | None]] = []
            if loss is not None:
                pairs.append((loss, None))
            pairs += [of for of in zip(carried, arrived) if of[1] is not None]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            grads: list[Tensor | None] = [None] * (len(parameters) + len(wanted))
            if pairs:
                grads = _backward(pairs, [*parameters, *wanted])
            found.append(grads[: len(parameters)])
            of_leaf = iter(grads[len(parameters) :])
            arrived = [next(of_leaf) if x.requires_grad else None for x in leaves]
        return found[::-1]


def _begun(value: Value) -> Value:
    """The same values, where a graph begins."""
    return mapped(lambda x: _leaves(x) if isinstance(x, Tensor) else x, value)


def _backward(
    ends: Sequence[tuple[Tensor, Tensor | None]], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of these; not by `grad`, which reentrant checkpointing refuses."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        roots, given = zip(*ends)
        torch.autograd.backward(roots, given)
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in zip(leaves, before):
            leaf.grad = grad


def _tensors(carry: Any) -> list[Tensor]:
    if isinstance(carry, Tensor):
        return [carry]
    parts = carry.values() if isinstance(carry, dict) else carry or ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _leaves(carry: Any) -> Any:
    """The same values for the next slice, whose graph starts there."""
    if isinstance(carry, Tensor):
        return carry.detach().requires_grad_(carry.requires_grad)
    return tuple(map(_leaves, carry))


def _aside(carry: Any) -> Any:
    """The same values with a node of their own: their gradient comes in last."""
    if isinstance(carry, Tensor):
        return carry.view_as(carry) if carry.requires_grad else carry
    return tuple(map(_aside, carry))


@dataclass(frozen=True)
class _Use:
    """A parameter that wants a gradient, in one stage.

    Attributes:
        parameter: the user's.
        stage: which.
        leaf: the parameter itself, or, where several stages share it, what stands for
            it in this one.
    """

    parameter: Tensor
    stage: int
    leaf: Tensor


def _uses(stages: Sequence[StageModule] | nn.Sequential) -> list[_Use]:
    found = [
        {
            id(parameter): parameter
            for unit in units_of(stage)
            for parameter in unit.parameters()
            if parameter.requires_grad
        }
        for stage in stages
    ]
    times = Counter(key for of_stage in found for key in of_stage)
    return [
        _Use(x, number, x if times[key] == 1 else _standing_for(x))
        for number, of_stage in enumerate(found)
        for key, x in of_stage.items()
    ]


def _standing_for(parameter: Tensor) -> Tensor:
    """A leaf with the same values and hooks."""
    leaf = parameter.detach().requires_grad_()
    leaf._backward_hooks = parameter._backward_hooks
    return leaf


def _own_leaves(
    stages: Sequence[StageModule] | nn.Sequential, uses: Sequence[_Use]
) -> list[dict[str, Tensor]]:
    """For each unit what stands for its parameters, by name; of most nothing does."""
    instead = {
        (use.stage, id(use.parameter)): use.leaf
        for use in uses
        if use.leaf is not use.parameter
    }
    return [
        {
            name: instead[number, id(parameter)]
            for name, parameter in unit.named_parameters(remove_duplicate=False)
            if (number, id(parameter)) in instead
        }
        for number, stage in enumerate(stages)
        for unit in units_of(stage)
    ]


def _add_up(
    uses: Sequence[_Use],
    schedule: Schedule,
    grads: Mapping[tuple[int, int], Gradients],
) -> None:
    """Each parameter's gradient, in the order of its stages' backwards, to `.grad`."""
    order = _backward_order(schedule)
    shared: dict[int, dict[int, list[Tensor | None]]] = {}
    parameters = {id(use.parameter): use.parameter for use in uses}
    for place, use in enumerate(uses):
        chains = [[grads[of][place] for of in chain] for chain in order[use.stage]]
        if use.leaf is not use.parameter:
            devices = shared.setdefault(id(use.parameter), {})
            first = min(pipe[use.stage] for pipe in schedule.placement.pipes)
            devices.setdefault(first, []).append(_sum(map(_sum, chains)))
            continue
        once = [_sum(map(_sum, chains))]
        for grad in once if len(chains) > 1 else chains[0]:
            _accumulate(use.parameter, grad)
    for parameter, devices in shared.items():
        in_order = [sums for _, sums in sorted(devices.items())]
        _accumulate(parameters[parameter], _sum(map(_sum, in_order)))


def _forward_order(schedule: Schedule) -> list[int]:
    """Micro-batches as the first stage runs them, device by device."""
    forwards = schedule.ops.take(
        (schedule.ops.kind == Kind.F) & (schedule.ops.stage == 0)
    )
    return [op.micro_batch for op in forwards if op.slice == 0]


def _backward_order(schedule: Schedule) -> list[list[list[tuple[int, int]]]]:
    """Of each stage, on each device that holds it, micro-batches and slices."""
    pipes = schedule.placement.pipes
    orders: list[dict[int, list[tuple[int, int]]]] = [
        {device: [] for device in sorted({pipe[stage] for pipe in pipes})}
        for stage in range(schedule.stages)
    ]
    for op, device in zip(schedule.ops, schedule.device_of_op.tolist()):
        if op.kind in (Kind.B, Kind.W):
            orders[op.stage][device].append((op.micro_batch, op.slice))
    return [list(order.values()) for order in orders]


def _sum(grads: Iterable[Tensor | None]) -> Tensor | None:
    """A chain, from left to right; None for a sum of nothing."""
    total = None
    for grad in grads:
        if grad is not None:
            if total is None or total.is_sparse:  # sparse + dense there is not
                total = grad if total is None else grad + total
            else:
                total = total + grad
    return total


def _accumulate(parameter: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if parameter.grad is None:
        parameter.grad = grad.detach().clone()
    elif parameter.grad.is_sparse:
        parameter.grad = grad + parameter.grad
    else:
        parameter.grad += grad
