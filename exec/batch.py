"""A batch → micro-batches, and the factor of each one's loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pipeproof.exec.errors import BatchError, LossError
from pipeproof.sched.errors import ParameterError

Value = Tensor | tuple[Tensor, ...]
"""What crosses a boundary between stages."""

LossScale = Literal["rows", "sum"] | Callable[[Any], float | Tensor]


def split(name: str, value: Value, micro_batches: int) -> list[Value]:
    """Rows in `micro_batches` parts, as `torch.tensor_split` cuts them.

    Args:
        name: what to call the value in messages.
        value: a tensor of shape (rows, …), or a tuple of such.
        micro_batches: how many parts, none of them empty.

    Raises:
        BatchError: not tensors, tensors of different rows, or fewer rows than
            micro-batches.
    """
    rows = rows_of(name, value)
    if rows < micro_batches:
        raise BatchError(
            f"{name} has {rows} rows for {micro_batches} micro-batches: give at least "
            "one row to each, or use a schedule with fewer micro-batches"
        )
    if isinstance(value, Tensor):
        return list(torch.tensor_split(value, micro_batches))
    parts = [torch.tensor_split(tensor, micro_batches) for tensor in value]
    return list(zip(*parts))


def rows_of(name: str, value: Value) -> int:
    """The number of rows that all tensors of a value share.

    Raises:
        BatchError: not a tensor or a tuple of tensors with the same rows.
    """
    tensors = (value,) if isinstance(value, Tensor) else value
    if not isinstance(tensors, tuple) or not tensors:
        raise BatchError(
            f"{name} must be a tensor or a tuple of tensors, got {type(value).__name__}"
        )
    rows = set()
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0:
            found = "a scalar" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise BatchError(f"{name} must be made of tensors with rows, got {found}")
        rows.add(tensor.shape[0])
    if len(rows) > 1:
        raise BatchError(f"{name} holds tensors of different rows: {sorted(rows)}")
    return rows.pop()


def check_scale(loss_scale: LossScale) -> None:
    """Refuse a loss scale that is none.

    Raises:
        ParameterError: neither "rows", "sum" nor callable.
    """
    if loss_scale not in ("rows", "sum") and not callable(loss_scale):
        raise ParameterError(
            "loss_scale must be 'rows', 'sum' or a callable of a micro-batch's "
            f"targets, got {loss_scale!r}"
        )


def factors(
    inputs: list[Value], targets: list[Value], loss_scale: LossScale
) -> list[float | None]:
    """What each micro-batch's loss is multiplied with; None for not at all.

    Args:
        inputs: of each micro-batch.
        targets: likewise.
        loss_scale: `rows` for a loss that is a mean over rows, `sum` for one that
            is a sum, or the weight of a micro-batch as a function of its targets.

    Raises:
        LossError: a weight that is not a finite number of at least 0, or weights
            that sum to 0.
    """
    if loss_scale == "sum":
        return [None] * len(inputs)
    if callable(loss_scale):
        weights = [float(loss_scale(target)) for target in targets]
    else:
        weights = [
            float((value if isinstance(value, Tensor) else value[0]).shape[0])
            for value in inputs
        ]
    for number, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise LossError(
                f"loss_scale gave micro-batch {number} the weight {weight}: expected "
                "a finite number of at least 0"
            )
    total = sum(weights)
    if total == 0:
        raise LossError(
            "loss_scale gave every micro-batch the weight 0: nothing counts, and the "
            "loss is undefined"
        )
    return [weight / total for weight in weights]


def check_loss(loss: Any, micro_batch: int) -> Tensor:
    """The loss, if it is one.

    Raises:
        LossError: not a floating scalar tensor.
    """
    if not isinstance(loss, Tensor):
        raise LossError(
            f"micro-batch {micro_batch}: the loss must be a tensor, got "
            f"{type(loss).__name__}"
        )
    if loss.dim() or not loss.is_floating_point():
        raise LossError(
            f"micro-batch {micro_batch}: the loss must be a floating-point scalar, got "
            f"shape {tuple(loss.shape)} of {loss.dtype}: reduce it to its mean (with "
            "loss_scale='rows') or its sum (with 'sum')"
        )
    return loss
