"""What makes a loss of the last stage's output, with targets or without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeproof.exec.batch import LossFn, Value
from pipeproof.exec.errors import BatchError, ModelError
from pipeproof.exec.units import StageModule, units_of


@dataclass(frozen=True)
class Loss:
    """A loss function of any kind, as one of output and targets.

    Attributes:
        call: (output, targets) → loss; targets are None where there are none.
        takes_targets, needs_targets: whether it can be called with them, and whether
            it must.
        modules: of one that is a module.
    """

    call: Callable[[Any, Any], Any]
    takes_targets: bool
    needs_targets: bool
    modules: tuple[nn.Module, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of its modules, each once."""
        found = [p for module in self.modules for p in module._parameters.values()]
        return list({id(p): p for p in found if p is not None}.values())

    @classmethod
    def of(cls, loss_fn: LossFn | None) -> Loss:
        """Of (output, targets), of the output alone, or None: the output is it."""
        if loss_fn is None:
            return cls(lambda output, _: output, False, False)
        alone: Any = loss_fn
        both: Any = loss_fn
        modules = tuple(loss_fn.modules()) if isinstance(loss_fn, nn.Module) else ()
        if not _may_be_called(loss_fn, 2):
            return cls(lambda output, _: alone(output), False, False, modules)
        if not _may_be_called(loss_fn, 1):
            return cls(both, True, True, modules)
        return cls(
            lambda output, targets: (
                alone(output) if targets is None else both(output, targets)
            ),
            True,
            False,
            modules,
        )

    def check(self, targets: Value | None) -> None:
        """Refuse targets that it does not take, and none where it needs them.

        Raises:
            BatchError: says which.
        """
        if targets is None and self.needs_targets:
            raise BatchError(
                "got no targets, which loss_fn takes: give them, or a loss_fn of the "
                "output alone, or None if the output is the loss"
            )
        if targets is not None and not self.takes_targets:
            raise BatchError(
                "got targets, and the loss is made of the output alone: leave them "
                "out, or give a loss_fn that takes both"
            )


def check_learning(
    loss: Loss,
    stages: Sequence[StageModule | None],
    mine: Collection[int],
    ranks: Sequence[int],
) -> None:
    """Refuse a loss with parameters whose gradients would stay apart.

    Args:
        loss: of the model.
        stages: as this rank was given them.
        mine: those that it runs.
        ranks: that run the last one.

    Raises:
        ModelError: it learns on several ranks, or what is another rank's.
    """
    learning = {id(p) for p in loss.parameters if p.requires_grad}
    where = [
        f"stage {number} of another rank has them too"
        for number, stage in enumerate(stages)
        if stage is not None and number not in mine
        for unit in units_of(stage)
        if not learning.isdisjoint(map(id, unit.parameters()))
    ]
    if len(ranks) > 1:
        where.append(f"ranks {', '.join(map(str, ranks))} run the last stage")
    if learning and where:
        raise ModelError(
            f"loss_fn has {len(learning)} parameters that require a gradient, and "
            f"{where[0]}, whose gradients nothing would add up: give them to the last "
            "stage, or freeze them"
        )


def _may_be_called(function: Callable[..., Any], arguments: int) -> bool:
    """Whether it takes so many; of one that does not say, whether it takes two."""
    if isinstance(function, nn.Module):  # whose __call__ takes anything
        function = function.forward
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return arguments == 2
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        return False
    return True
