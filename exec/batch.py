"""A batch → micro-batches and their slices, and the factor of each one's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from pipeproof.exec.errors import BatchError, LossError
from pipeproof.exec.tensors import PLAIN, flat, learning, mapped
from pipeproof.sched.errors import ParameterError

Value = Any
"""What crosses a boundary between stages: see `pipeproof.exec.tensors`."""

LossFn = Callable[[Any, Any], Tensor] | Callable[[Any], Tensor]
"""Of the last stage's output and targets, or of the output alone."""
LossScale = Literal["rows", "sum"] | Callable[[Any], float | Tensor]

NO_KEYWORDS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Marks a part of a batch that every micro-batch gets as it is.

    A tensor in a batch is cut into rows; one whose first dimension is no row (offsets
    of sequences such as `cu_seqlens`, a table, a mask that all rows share) must be
    marked so. What is no tensor every micro-batch gets anyway.

    Attributes:
        value: a value whose tensors want no gradient.
    """

    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a step is given; each may be missing where it is not needed."""

    inputs: Value | None
    targets: Value | None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    scaler: GradScaler | None = None
    accumulate: bool = False


def split(
    name: str, value: Value, micro_batches: int, slices: int = 1
) -> list[list[Value]]:
    """Each micro-batch's slices, as `torch.tensor_split` cuts rows and positions.

    Args:
        name: what to call the value in messages.
        value: a tensor of shape (rows, …), or tuples, lists and dicts of such, of
            `Whole` and of what is no tensor; (rows, positions, …) where there are
            several slices.
        micro_batches: how many parts, none of them empty.
        slices: of each micro-batch along its positions, none of them empty.

    Raises:
        BatchError: no tensors, tensors of different rows or positions, or fewer
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
        if isinstance(value, Tensor):  # nearly always: there is nothing to unmark
            return [[part] for part in parts]
        return [[unmarked(part)] for part in parts]
    positions = positions_of(name, value)
    if positions < slices:
        raise BatchError(
            f"{name} has {positions} positions for {slices} slices: give at least one "
            "to each, or use a schedule with fewer slices"
        )
    return [list(map(unmarked, _cut(part, slices, 1))) for part in parts]


def split_keywords(
    keywords: Mapping[str, Any], rows: int, positions: int, parts: tuple[int, int]
) -> list[list[dict[str, Any]]]:
    """Each slice's keyword inputs.

    Tensors of as many rows as the batch are cut as it is; scalars, `Whole` and what
    is no tensor every slice gets as they are. No other tensor is cut, nor guessed at.

    Args:
        keywords: by name.
        rows: of the batch.
        positions: of the batch.
        parts: micro-batches, and slices in each.

    Raises:
        BatchError: a tensor of other rows or positions, or one that wants a gradient.
    """
    for name, value in keywords.items():
        _check_keyword(name, value, rows, positions, parts[1])
    result = []
    for part in _cut(dict(keywords), parts[0], 0):
        slices = [part] if parts[1] == 1 else _cut(part, parts[1], 1)
        result.append([unmarked(each) for each in slices])
    return result


def no_unit_takes(names: Iterable[str], taken: Iterable[str]) -> str:
    """In words."""
    known = ", ".join(map(repr, sorted(taken))) or "none"
    return (
        f"no unit takes the keyword input {', '.join(map(repr, names))}: the forward "
        "of one that does has a parameter of that name behind its first; found "
        f"{known}"
    )


def check_needed(needed: Iterable[str], keywords: Mapping[str, Any]) -> None:
    """Refuse a batch without keyword inputs that units have no default for.

    Raises:
        BatchError: it is one.
    """
    if missing := sorted(set(needed) - keywords.keys()):
        example = ", ".join(f"{name!r}: …" for name in missing)
        raise BatchError(
            f"got no keyword input {', '.join(map(repr, missing))}, which the forward "
            f"of a unit must have: give keywords={{{example}}}; only the first of its "
            "parameters is its input"
        )


def _check_keyword(
    name: str, value: Any, rows: int, positions: int, slices: int
) -> None:
    for leaf in flat(value):
        if isinstance(leaf, Whole):
            _check_whole(name, leaf)
        if not isinstance(leaf, Tensor):
            continue
        if leaf.requires_grad:
            raise BatchError(
                f"keyword input {name!r} requires a gradient, which nothing would "
                "receive: detach it, or make it part of the inputs"
            )
        if leaf.dim() == 0:
            continue
        if leaf.shape[0] != rows:
            raise BatchError(
                f"keyword input {name!r} has shape {tuple(leaf.shape)} and the batch "
                f"{rows} rows: a tensor whose first dimension is the batch's is cut as "
                f"it is, any other must be marked Whole({name}) for every micro-batch "
                "to get it as it is"
            )
        if slices > 1 and leaf.dim() > 1 and leaf.shape[1] != positions:
            raise BatchError(
                f"keyword input {name!r} has shape {tuple(leaf.shape)}, and the "
                f"schedule cuts {positions} positions along dimension 1: it must have "
                "as many, or be marked Whole, or the schedule be one without slices"
            )


def _cut(value: Value, parts: int, dim: int) -> list[Value]:
    """Leaves without that dimension, and what is no tensor, are in every part."""
    if isinstance(value, Tensor):
        if value.dim() <= dim:
            return [value] * parts
        return list(torch.tensor_split(value, parts, dim))
    kind = type(value)
    if kind is dict:
        cut = [_cut(part, parts, dim) for part in value.values()]
        return [dict(zip(value, of)) for of in (zip(*cut) if cut else [()] * parts)]
    if kind is tuple or kind is list:
        cut = [_cut(part, parts, dim) for part in value]
        return [kind(of) for of in (zip(*cut) if cut else [()] * parts)]
    return [value] * parts


def unmarked(value: Value) -> Value:
    """With what is in each `Whole` in its place."""
    if isinstance(value, Tensor):
        return value
    return mapped(lambda leaf: leaf.value if isinstance(leaf, Whole) else leaf, value)


def _check_whole(name: str, whole: Whole) -> None:
    if learning(whole.value):
        raise BatchError(
            f"{name} has a tensor marked Whole that requires a gradient, which would "
            "come from every micro-batch: detach it, or make it a parameter"
        )


def _tensors(name: str, value: Value) -> list[Tensor]:
    """Those that are cut."""
    if isinstance(value, Tensor):
        return [value]
    result = []
    for leaf in flat(value):
        if isinstance(leaf, Whole):
            _check_whole(name, leaf)
        elif isinstance(leaf, Tensor):
            result.append(leaf)
        elif type(leaf) not in PLAIN:
            raise BatchError(
                f"{name} holds {type(leaf).__name__}: a batch is made of tensors, "
                "bools, ints, floats, str and None, in tuples, lists and dicts"
            )
    if not result:
        raise BatchError(
            f"{name} must hold a tensor, which is cut into rows, got "
            f"{type(value).__name__} without"
        )
    return result


def positions_of(name: str, value: Value) -> int:
    """The length of the sequence, dimension 1, that all tensors of a value share.

    Raises:
        BatchError: a tensor without it, or tensors of different lengths.
    """
    positions = set()
    for tensor in _tensors(name, value):
        if tensor.dim() < 2:
            raise BatchError(
                f"{name} cannot be cut into slices: dimension 1 is the sequence, found "
                f"a tensor of shape {tuple(tensor.shape)}"
            )
        positions.add(tensor.shape[1])
    if len(positions) > 1:
        raise BatchError(
            f"{name} holds tensors of different positions: {sorted(positions)}: mark "
            "those Whole that are not cut"
        )
    return positions.pop()


def rows_of(name: str, value: Value) -> int:
    """The number of rows that all tensors of a value share.

    Raises:
        BatchError: no tensor in it, one that is not cut, or different rows.
    """
    rows = set()
    for tensor in _tensors(name, value):
        if tensor.layout != torch.strided:
            raise BatchError(
                f"{name} holds a tensor of layout {tensor.layout}, which is not cut "
                "into rows: make it dense, or mark it Whole"
            )
        if tensor.dim() == 0:
            raise BatchError(
                f"{name} must be made of tensors with rows, got a scalar: mark it Whole"
            )
        rows.add(tensor.shape[0])
    if len(rows) > 1:
        raise BatchError(
            f"{name} holds tensors of different rows: {sorted(rows)}: mark those Whole "
            "that are not cut"
        )
    return rows.pop()


def size_of(name: str, value: Value, slices: int) -> tuple[int, int]:
    """Rows and positions of a value; positions 1 where they are not cut."""
    return rows_of(name, value), positions_of(name, value) if slices > 1 else 1


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


def check_pairs(inputs: Value, targets: Value, slices: int) -> tuple[int, int]:
    """Refuse targets that are not those of the inputs.

    Returns:
        Rows and positions of the batch; positions 1 where they are not cut.

    Raises:
        BatchError: other rows, or with slices other positions.
    """
    size, found = size_of("inputs", inputs, slices), size_of("targets", targets, slices)
    if size[0] != found[0]:
        raise BatchError(
            f"targets have {found[0]} rows and inputs {size[0]}: each row of the "
            "inputs needs its target"
        )
    if size[1] != found[1]:
        raise BatchError(
            f"targets have {found[1]} positions and inputs {size[1]}: in slices each "
            "position of the inputs needs its target"
        )
    return size


def no_targets(micro_batches: int, slices: int) -> list[list[Value]]:
    """Of each micro-batch's slices, where there are none."""
    return [[None] * slices for _ in range(micro_batches)]


Weights = list[list[float]]
"""Of each micro-batch's slices."""


def weights(
    targets: list[list[Value]], loss_scale: LossScale, rows: int, positions: int = 1
) -> Weights | None:
    """What the loss of each slice counts; None where it is a sum.

    Args:
        targets: of each micro-batch, the slices.
        loss_scale: `rows` for a loss that is a mean over rows (and, where there are
            slices, over positions), `sum` for one that is a sum, or the weight of a
            slice as a function of its targets.
        rows: of the batch.
        positions: of the batch; 1 where they are not cut.

    Raises:
        LossError: a weight that is not a finite number of at least 0, or none known
            for want of targets.
    """
    if loss_scale == "sum":
        return None
    if callable(loss_scale):
        if targets[0][0] is None:
            raise LossError(
                "loss_scale is a callable of targets, and there are none: give "
                "'rows', 'sum', or targets"
            )
        found = [[float(loss_scale(part)) for part in of] for of in targets]
    else:
        across = _lengths(positions, len(targets[0]))
        found = [
            [float(down * right) for right in across]
            for down in _lengths(rows, len(targets))
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
    targets: list[list[Value]], loss_scale: LossScale, rows: int, positions: int = 1
) -> list[list[float | None]]:
    """What the loss of each slice is multiplied with; None for not at all.

    Args:
        targets: as for `weights`; of all there are.
        loss_scale: likewise.
        rows: likewise.
        positions: likewise.

    Raises:
        LossError: as `weights` and `shares`.
    """
    found = weights(targets, loss_scale, rows, positions)
    if found is None:
        return [[None] * len(parts) for parts in targets]
    return shares(found, total_of(found))


def _lengths(whole: int, parts: int) -> list[int]:
    """Of the parts that `torch.tensor_split` makes."""
    size, longer = divmod(whole, parts)
    return [size + (part < longer) for part in range(parts)]


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
