"""The norm of all gradients, wherever they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pipeproof.sched.errors import ParameterError


def check_norm(max_norm: float, norm_type: float) -> None:
    """Refuse what is no norm.

    Raises:
        ParameterError: either is not above 0.
    """
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if not value > 0:
            raise ParameterError(f"{name} must be above 0, got {value}")


def norms(parameters: Iterable[nn.Parameter], norm_type: float) -> list[float]:
    """Of each gradient there is; of a sharded one, of all of it."""
    return [_norm(p.grad, norm_type) for p in parameters if p.grad is not None]


def _norm(grad: Tensor, norm_type: float) -> float:
    found = torch.linalg.vector_norm(grad, norm_type, dtype=_at_least_float(grad))
    if (whole := getattr(found, "full_tensor", None)) is not None:
        found = whole()  # the peers that share it all ask for it
    return float(found)


def _at_least_float(grad: Tensor) -> torch.dtype | None:
    """A half's square is soon out of its range."""
    return torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None


def total(found: Sequence[float], norm_type: float) -> float:
    """Of all gradients, from each one's norm."""
    if math.isinf(norm_type):
        return max(found, default=0.0)
    parts = torch.tensor(found, dtype=torch.float64, device="cpu")
    return float(torch.linalg.vector_norm(parts, norm_type))


def scale(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Multiply gradients so that their norm is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`: a norm that is NaN makes all of them so.
    """
    factor = max_norm / (norm + 1e-6)
    if factor >= 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
