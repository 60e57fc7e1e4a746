"""Loss scaling with torch's GradScaler: an overflow anywhere is one everywhere.

A GradScaler looks for infinities in the gradients of one optimizer, on one rank. If
another stage's overflowed, this one's step would be taken and its scale kept, and the
stages would part. So behind a step, if any gradient of any stage is not finite, all of
them are set to infinity: each scaler finds some, skips its step and lowers its scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler


def ready(scaler: GradScaler, device: torch.device) -> None:
    """Make a scaler's scale, as it does itself with the first loss that it sees."""
    scaler.scale(torch.zeros((), device=device))


def overflowed(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether any gradient is not finite; of a sharded one, the part here."""
    found = [p.grad for p in parameters if p.grad is not None]
    here = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in found]
    return not all(bool(torch.isfinite(grad).all()) for grad in here)


def overflow(parameters: Sequence[nn.Parameter]) -> None:
    """Set all gradients to infinity."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.fill_(torch.inf)


def scaled(loss: Tensor, scaler: GradScaler | None) -> Tensor:
    """The loss that a backward starts from."""
    return loss if scaler is None else scaler.scale(loss)
