"""What changes from step to step, and the loss of one slice in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec.batch import NO_KEYWORDS, Value, check_loss
from pipeproof.exec.scaling import scaled


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
        losses: with their factors, once they are known.
        of_all: where ranks run the step, the losses of all of them, in order.
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
    losses: list[list[Tensor | None]] = field(init=False)
    of_all: list[Tensor] = field(init=False, default_factory=list)
    input_grads: list[list[Value | None]] = field(init=False)
    outputs: list[list[Value]] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = [[None] * len(parts) for parts in self.factors]
        self.input_grads = [[None] * len(parts) for parts in self.factors]
        self.outputs = [[None] * len(parts) for parts in self.factors]

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
        if self.losses[micro_batch][part] is None:
            self.losses[micro_batch][part] = loss.detach()
        return scaled(loss, self.scaler)

    @property
    def parts(self) -> list[Tensor]:
        """What each micro-batch and slice adds to the batch's loss, in order."""
        return self.of_all or [
            loss for parts in self.losses for loss in parts if loss is not None
        ]

    @property
    def loss(self) -> Tensor:
        """The batch's loss, summed by micro-batch and slice."""
        first, *others = self.parts
        total = first.clone()
        for loss in others:
            total += loss.to(total.device)
        return total
