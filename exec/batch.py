"""A batch → micro-batches and their slices, and the factor of each one's loss."""

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

LossFn = Callable[[Any, Any], Tensor]
LossScale = Literal["rows", "sum"] | Callable[[Any], float | Tensor]


def split(
    name: str, value: Value, micro_batches: int, slices: int = 1
) -> list[list[Value]]:
    """Each micro-batch's slices, as `torch.tensor_split` cuts rows and positions.

    Args:
        name: what to call the value in messages.
        value: a tensor of shape (rows, …), or a tuple of such; (rows, positions, …)
            where there are several slices.
        micro_batches: how many parts, none of them empty.
        slices: of each micro-batch along its positions, none of them empty.

    Raises:
        BatchError: not tensors, tensors of different rows or positions, or fewer
            of them than micro-batches or slices.
    """
    rows = rows_of(name, value)
    if rows < micro_batches:
        raise BatchError(
            f"{name} has {rows} rows for {micro_batches} micro-batches: give at least "
            "one row to each, or use a schedule with fewer micro-batches"
        )
    parts = _cut(value, micro_batches, 0)
    if slices == 1:
        return [[part] for part in parts]
    positions = positions_of(name, value)
    if positions < slices:
        raise BatchError(
            f"{name} has {positions} positions for {slices} slices: give at least one "
            "to each, or use a schedule with fewer slices"
        )
    return [_cut(part, slices, 1) for part in parts]


def _cut(value: Value, parts: int, dim: int) -> list[Value]:
    if isinstance(value, Tensor):
        return list(torch.tensor_split(value, parts, dim))
    return list(zip(*(torch.tensor_split(tensor, parts, dim) for tensor in value)))


def positions_of(name: str, value: Value) -> int:
    """The length of the sequence, dimension 1, that all tensors of a value share.

    Raises:
        BatchError: a tensor without it, or tensors of different lengths.
    """
    positions = set()
    for tensor in (value,) if isinstance(value, Tensor) else value:
        if tensor.dim() < 2:
            raise BatchError(
                f"{name} cannot be cut into slices: dimension 1 is the sequence, found "
                f"a tensor of shape {tuple(tensor.shape)}"
            )
        positions.add(tensor.shape[1])
    if len(positions) > 1:
        raise BatchError(
            f"{name} holds tensors of different positions: {sorted(positions)}"
        )
    return positions.pop()


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


def check_pairs(inputs: Value, targets: Value, slices: int) -> None:
    """Refuse targets that are not those of the inputs.

    Raises:
        BatchError: other rows, or with slices other positions.
    """
    rows, found = rows_of("inputs", inputs), rows_of("targets", targets)
    if rows != found:
        raise BatchError(
            f"targets have {found} rows and inputs {rows}: each row of the inputs "
            "needs its target"
        )
    if slices == 1:
        return
    positions, found = positions_of("inputs", inputs), positions_of("targets", targets)
    if positions != found:
        raise BatchError(
            f"targets have {found} positions and inputs {positions}: in slices each "
            "position of the inputs needs its target"
        )


Weights = list[list[float]]
"""Of each micro-batch's slices."""


def weights(
    inputs: list[list[Value]], targets: list[list[Value]], loss_scale: LossScale
) -> Weights | None:
    """What the loss of each slice counts; None where it is a sum.

    Args:
        inputs: of each micro-batch, the slices.
        targets: likewise.
        loss_scale: `rows` for a loss that is a mean over rows (and, where there are
            slices, over positions), `sum` for one that is a sum, or the weight of a
            slice as a function of its targets.

    Raises:
        LossError: a weight that is not a finite number of at least 0.
    """
    if loss_scale == "sum":
        return None
    found = [
        [
            float(loss_scale(target)) if callable(loss_scale) else _size(value, of)
            for value, target in zip(of, labels)
        ]
        for of, labels in zip(inputs, targets)
    ]
    for number, of_slices in enumerate(found):
        for part, weight in enumerate(of_slices):
            if not math.isfinite(weight) or weight < 0:
                where = f", slice {part}" if len(of_slices) > 1 else ""
                raise LossError(
                    f"loss_scale gave micro-batch {number}{where} the weight {weight}: "
                    "expected a finite number of at least 0"
                )
    return found


def total_of(found: Weights | None) -> float:
    """The sum of weights, in their order; 0 where there are none."""
    return sum(map(sum, found or []))


def shares(found: Weights, total: float) -> list[list[float | None]]:
    """What the loss of each slice is multiplied with: its part of the total.

    Raises:
        LossError: a total of 0.
    """
    if total == 0:
        raise LossError(
            "loss_scale gave every micro-batch the weight 0: nothing counts, and the "
            "loss is undefined"
        )
    return [[weight / total for weight in of_slices] for of_slices in found]


def factors(
    inputs: list[list[Value]], targets: list[list[Value]], loss_scale: LossScale
) -> list[list[float | None]]:
    """What the loss of each slice is multiplied with; None for not at all.

    Args:
        inputs: as for `weights`; of all there are.
        targets: likewise.
        loss_scale: likewise.

    Raises:
        LossError: as `weights` and `shares`.
    """
    found = weights(inputs, targets, loss_scale)
    if found is None:
        return [[None] * len(parts) for parts in inputs]
    return shares(found, total_of(found))


def _size(value: Value, slices: list[Value]) -> float:
    """Rows, or rows × positions where these are cut too."""
    shape = (value if isinstance(value, Tensor) else value[0]).shape
    return float(shape[0] * (shape[1] if len(slices) > 1 else 1))


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
