"""STEP: a stage's optimizer updates its weights while other stages still go on.

    device 0   … B2 ─▶ .grad ─▶ STEP
    device 1   … B2 ─▶ .grad ─▶ REDUCE ─▶ .grad ─▶ STEP

A STEP comes when the stage's gradient of the batch is whole: behind the last of its
backwards, and behind the sum over the devices and processes that hold it. It calls the
optimizer's `step`, then its `zero_grad`. Stages are updated one by one, so whatever
needs the gradients of all of them first has no place in such a schedule.

What stages share is in the optimizer of each. Between ranks each updates its own copy,
by the same sum and so alike; on one rank the first stage's does, once, and the others
have its state, so that what they save is what ranks would.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from pipeproof.exec.errors import ModelError
from pipeproof.exec.replicas import Run
from pipeproof.exec.stage import Stage
from pipeproof.exec.step import Step
from pipeproof.sched import Kind, ParameterError, Schedule

Optimizers = Sequence[Optimizer | None]
"""One for each stage; None where it learns nothing, or is another rank's."""

WHOLE_FIRST = (
    "the STEPs of the schedule use each stage's gradient before those of all are "
    "known: {}, or leave the STEPs out, and step the optimizers yourself"
)
"""What is refused beside STEPs, with what else to do."""

HALF_UPDATED = (
    "\nSome stages may be updated and others not, and gradients be half added up: load "
    "a checkpoint before the next step."
)


def check_optimizers(optimizers: Optimizers | None, schedule: Schedule) -> None:
    """Refuse optimizers without STEPs, STEPs without optimizers, and other numbers.

    Raises:
        ParameterError: what is missing.
    """
    stepped = schedule.has(Kind.STEP)
    if optimizers is None:
        if stepped:
            raise ParameterError(
                f"{schedule.summary} has STEPs, and nothing to step with: give "
                "optimizers=, one for each stage, or leave the STEPs out"
            )
        return
    if not stepped:
        raise ParameterError(
            f"optimizers are stepped where the schedule says STEP, and "
            f"{schedule.summary} has none: add them with with_steps(schedule), or step "
            "the optimizers yourself"
        )
    several = isinstance(optimizers, Sequence)
    if not several or len(optimizers) != schedule.stages:
        found = f"{len(optimizers)}" if several else type(optimizers).__name__
        raise ParameterError(
            f"optimizers must have one for each of {schedule.stages} stages, or None "
            f"for one that learns nothing, got {found}"
        )


def updated_by(
    optimizers: Optimizers | None, stages: Iterable[Stage]
) -> dict[int, Optimizer]:
    """The optimizers of the stages here, by stage.

    Args:
        optimizers: as `check_optimizers` lets through.
        stages: the user's own.

    Raises:
        ModelError: one that has not the parameters of its stage, or others'.
    """
    result: dict[int, Optimizer] = {}
    for stage in stages if optimizers is not None else ():
        assert optimizers is not None
        optimizer = optimizers[stage.number]
        _check(stage, optimizer)
        if optimizer is not None:
            result[stage.number] = optimizer
    return result


def _check(stage: Stage, optimizer: Optimizer | None) -> None:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ModelError(
            f"the optimizer of stage {stage.number} must be a torch.optim.Optimizer or "
            f"None, got {type(optimizer).__name__}"
        )
    if optimizer is not None and not _needs_nothing(optimizer):
        raise ModelError(
            f"the optimizer of stage {stage.number}, {type(optimizer).__name__}, needs "
            "a closure that runs the model again: use one that steps by gradients alone"
        )
    own = {id(parameter) for parameter in stage.parameters}
    learning = {id(p) for p in stage.parameters if p.requires_grad}
    groups = [] if optimizer is None else optimizer.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if missing := len(learning - held):
        raise ModelError(
            f"stage {stage.number} has {missing} parameters that require a gradient "
            "and are not in its optimizer: give it all of them, or freeze them"
        )
    if foreign := len(held - own):
        raise ModelError(
            f"the optimizer of stage {stage.number} has {foreign} parameters that are "
            "not the stage's, and would update them by half a gradient: give each "
            "stage an optimizer of its own"
        )


def _needs_nothing(optimizer: Optimizer) -> bool:
    """Whether its `step` can be called as it is; True of one that does not say.

    A learning rate's scheduler hides it behind a function that says something else.
    """
    try:
        signature(type(optimizer).step).bind(optimizer)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


class HasStep(Protocol):
    """Knows the step under way."""

    step: Step


def in_words(optimizer: Optimizer | None) -> str:
    """An optimizer and its numbers, which those of all copies must have alike."""
    if not isinstance(optimizer, Optimizer):
        return type(optimizer).__name__
    groups = [
        _numbers(group) | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__} {groups}"


def how_updated(parameter: nn.Parameter, optimizer: Optimizer | None) -> str:
    """What updates a parameter, and by which numbers."""
    if optimizer is None or not parameter.requires_grad:
        return "nothing"
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            return f"{type(optimizer).__name__} {_numbers(group)}"
    return "nothing"


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


@dataclass(frozen=True)
class Common:
    """What a stage shares with others of its process, each with an optimizer of it.

    Attributes:
        earlier: with an earlier stage, whose optimizer updates it.
        later: with a later stage, and that stage's optimizer, which is to know what
            this one's keeps of it: moments, say.
    """

    earlier: tuple[nn.Parameter, ...]
    later: tuple[tuple[nn.Parameter, Optimizer], ...]


def in_common(
    stages: Iterable[Stage], optimizers: Mapping[int, Optimizer]
) -> dict[int, Common]:
    """By stage, what it shares.

    Args:
        stages: of this process, the user's own.
        optimizers: of these, by stage.
    """
    first: dict[int, int] = {}
    earlier: dict[int, list[nn.Parameter]] = {}
    later: dict[int, list[tuple[nn.Parameter, Optimizer]]] = {}
    for stage in sorted(stages, key=lambda stage: stage.number):
        for parameter in stage.parameters if stage.number in optimizers else ():
            owner = first.setdefault(id(parameter), stage.number)
            if owner != stage.number:
                pair = parameter, optimizers[stage.number]
                earlier.setdefault(stage.number, []).append(parameter)
                later.setdefault(owner, []).append(pair)
    return {
        number: Common(tuple(earlier.get(number, ())), tuple(later.get(number, ())))
        for number in optimizers
    }


def update(optimizer: Optimizer, of: HasStep, finish: Run, common: Common) -> Run:
    """What a STEP does.

    Args:
        optimizer: of the stage.
        of: knows the step under way.
        finish: waits for what others add to the stage's gradient.
        common: what it shares here.
    """

    def step() -> None:
        if of.step.accumulates:
            return
        finish()
        grads = [parameter.grad for parameter in common.earlier]
        for parameter in common.earlier:
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for parameter, grad in zip(common.earlier, grads):
            parameter.grad = grad
        for parameter, other in common.later:
            if parameter in optimizer.state:
                other.state[parameter] = optimizer.state[parameter]

    return step
