"""Stages that several devices hold, and the sum of their gradients.

Each such device adds up the gradients of its own micro-batches, apart from the
others and from what `.grad` held before; REDUCE sums these over the devices, in
their order, and adds the sum to `.grad` once::

    device 0   B0 + B2 + B5 ──┐
                              ├──▶ sum ──▶ .grad
    device 3   B1 + B3 + B4 ──┘

Devices of the schedule that share a torch device share one module: while one of
them runs a backward, its own sums stand in the parameters' `.grad`. On another
torch device a copy runs, which takes over the user's values before each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeproof.exec.errors import ModelError
from pipeproof.exec.stage import Stage
from pipeproof.exec.units import StageModule

Run = Callable[[], None]

Accumulate = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
"""Adds gradients to those that parameters have."""


class Owner(Protocol):
    """A stage, or what else has parameters whose gradients are summed."""

    @property
    def number(self) -> int | str:
        """To say which."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In an order that all that hold them have."""


class Sums:
    """The gradients of one stage on one device of the schedule, in this step.

    Args:
        stage: as that device holds it.
    """

    def __init__(self, stage: Owner) -> None:
        self.stage = stage
        self.begin()

    def begin(self) -> None:
        """Nothing is summed yet."""
        self.grads: list[Tensor | None] = [None] * len(self.stage.parameters)

    def taken(self) -> list[Tensor | None]:
        """What is summed; here nothing is any more."""
        grads = self.grads
        self.begin()
        return grads

    def around(self, run: Run) -> Run:
        """A backward that adds to these sums instead of to `.grad`."""

        def apart() -> None:
            self.swap()
            try:
                run()
            finally:
                self.swap()

        return apart

    def swap(self) -> None:
        """Put what is summed here into `.grad`, and take what was there."""
        grads = self.grads
        for number, parameter in enumerate(self.stage.parameters):
            parameter.grad, grads[number] = grads[number], parameter.grad


def accumulate(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add to `.grad`, as a backward does; what is given may become it."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad = added(parameter.grad, grad)


def total(one: Tensor, other: Tensor) -> Tensor:
    """Of two gradients, of which either may be sparse."""
    return other + one if one.is_sparse else one + other


def added(one: Tensor, other: Tensor) -> Tensor:
    """The same, in place of the first where it can be."""
    if one.is_sparse and not other.is_sparse:
        return other + one
    one += other
    return one


class Reduction(Protocol):
    """Sums gradients of stages, or of ties, over the processes that hold them."""

    @property
    def stages(self) -> frozenset[int]:
        """Whose, by number."""

    def begin(
        self, index: int, stage: int, sums: Sums, add: Accumulate = accumulate
    ) -> None:
        """Take over what is summed here; `add` gets the total, sooner or later."""

    def complete(self, stage: int) -> None:
        """Return once the total of a stage, if it has begun, is added."""


def add_up(parts: Sequence[Sums], add: Accumulate) -> None:
    """REDUCE: the sums of all devices, in their order, once to the user's `.grad`.

    Args:
        parts: of the devices, in ascending order; used up.
        add: adds them.
    """
    stage = parts[0].stage
    assert isinstance(stage, Stage)
    parameters = stage.original.parameters
    found = list(zip(*(part.taken() for part in parts)))
    add(parameters, list(map(_total, parameters, found)))


def _total(parameter: Tensor, found: Sequence[Tensor | None]) -> Tensor | None:
    there = [grad for grad in found if grad is not None]
    if not there:
        return None
    result = there[0].to(parameter.device)
    for grad in there[1:]:
        result = added(result, grad.to(parameter.device))
    return result


class Replica(Stage):
    """A copy of a stage on another torch device.

    Args:
        original: the stage that the user's optimizer knows.
        module: as the user gave it.
        device: where the copy runs.

    Raises:
        ModelError: a module that cannot be copied.
    """

    def __init__(
        self, original: Stage, module: StageModule, device: torch.device
    ) -> None:
        try:
            twin = copy.deepcopy(module)
        except Exception as error:
            raise ModelError(
                f"stage {original.number} is held on several devices, and its module "
                f"cannot be copied to {device}: {type(error).__name__}: {error}"
            ) from error
        number, first, routes = original.number, original.first_unit, original.routes
        super().__init__(number, twin, first, device, routes)
        self._original = original

    @property
    def original(self) -> Stage:
        """The stage that this is a copy of."""
        return self._original

    def begin(self) -> None:
        """Take over the original's values, flags and modes; get ready."""
        pairs = list(zip(self.modules, self._original.modules, strict=True))
        with torch.no_grad():
            for ours, theirs in pairs:
                ours.training = theirs.training
                _take_over(ours._buffers, theirs._buffers)
                _take_over(ours._parameters, theirs._parameters)
        super().begin()


def _take_over(
    ours: dict[str, nn.Parameter | None] | dict[str, Tensor | None],
    theirs: dict[str, nn.Parameter | None] | dict[str, Tensor | None],
) -> None:
    for name, tensor in theirs.items():
        mine = ours[name]
        if tensor is not None and mine is not None:
            mine.copy_(tensor)
            mine.requires_grad_(tensor.requires_grad)
            mine.grad = None
