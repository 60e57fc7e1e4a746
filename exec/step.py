"""What changes from step to step, and the losses in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec.batch import NO_KEYWORDS, Value, check_loss
from pipeproof.exec.scaling import scaled

Slice = tuple[int, int]
"""A micro-batch, and which slice of it."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What each micro-batch and slice adds to the batch's loss, in order."""

    parts: Sequence[Tensor]

    @property
    def total(self) -> Tensor:
        """The batch's loss: the parts, added up in their order."""
        first, *others = self.parts
        total = first.clone()
        for loss in others:
            total += loss.to(total.device)
        return total


@dataclass(frozen=True, slots=True)
class ToldLosses:
    """Losses that other ranks told: numbers, and tensors when these are asked for.

    Attributes:
        numbers: of the parts, as `Losses` has them.
        dtypes: of these; one if it is that of all.
        device: where they are wanted.
        known: the total, if it was told too.
    """

    numbers: Sequence[float]
    dtypes: Sequence[torch.dtype]
    device: torch.device
    known: float | None = None

    @property
    def parts(self) -> Sequence[Tensor]:
        """As of `Losses`."""
        one = len(self.dtypes) == 1
        dtypes = list(self.dtypes) * len(self.numbers) if one else self.dtypes
        return [
            torch.scalar_tensor(number, dtype=dtype, device=self.device)
            for number, dtype in zip(self.numbers, dtypes)
        ]

    @property
    def total(self) -> Tensor:
        """As of `Losses`."""
        if self.known is None:
            return Losses(self.parts).total
        dtype = self.dtypes[0]
        return torch.scalar_tensor(self.known, dtype=dtype, device=self.device)


@dataclass
class Step:
    """One batch, under way.

    All lists are of micro-batches, and in each of its slices.

    Attributes:
        seed: of all its randomness.
        inputs, targets: on the first and the last device of their pipe.
        with_loss: whether the last stage ends in one.
        factors: of the losses; None for not at all.
        keywords: by device, of each micro-batch and slice, the keyword inputs.
        scaler: multiplies losses before their backward.
        accumulates: STEPs leave the gradients for the next step.
        losses: here, with their factors, once they are known.
        told: where other ranks have losses, those of all.
        input_grads: where the inputs want a gradient.
        outputs: of the last stage, where there are only forwards.
    """

    seed: int
    inputs: list[list[Value]]
    targets: list[list[Value]]
    factors: list[list[float | None]]
    keywords: dict[torch.device, list[list[dict[str, Any]]]] = field(
        default_factory=dict
    )
    scaler: GradScaler | None = None
    accumulates: bool = False
    with_loss: bool = True
    losses: dict[Slice, Tensor] = field(init=False, default_factory=dict)
    told: ToldLosses | None = field(init=False, default=None)
    input_grads: dict[Slice, Value] = field(init=False, default_factory=dict)
    outputs: dict[Slice, Value] = field(init=False, default_factory=dict)

    def keywords_at(
        self, device: torch.device, micro_batch: int, part: int
    ) -> Mapping[str, Any]:
        """The keyword inputs of a slice, on a device."""
        if not self.keywords:
            return NO_KEYWORDS
        return self.keywords[device][micro_batch][part]

    def scaled(self, found: object, micro_batch: int, part: int) -> Tensor:
        """The loss as it counts in the batch's; it is kept when it comes first.

        Raises:
            LossError: not a floating scalar tensor.
        """
        loss = check_loss(found, micro_batch)
        factor = self.factors[micro_batch][part]
        if factor == 0:
            # What does not count may be undefined: a mean over no tokens is NaN.
            loss = torch.zeros_like(loss, requires_grad=False)
        elif factor is not None:
            loss = loss * factor
        if (micro_batch, part) not in self.losses:
            self.losses[micro_batch, part] = loss.detach()
        return scaled(loss, self.scaler)

    @property
    def all_losses(self) -> Losses | ToldLosses:
        """Of all ranks."""
        if self.told is not None:
            return self.told
        return Losses([self.losses[where] for where in sorted(self.losses)])
