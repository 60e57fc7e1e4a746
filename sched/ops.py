"""Operations: single ones, and columns of integers that hold millions of them.

An `Op` is a view of one row of the columns. The facts about a kind of op, what
it belongs to and how it is written, are here and nowhere else.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError

Ints = NDArray[np.int32]
MAX_NUMBER = 2**31 - 1


class Kind(IntEnum):
    """What an operation does; the names are how they are written."""

    F = 0
    """Forward."""
    B = 1
    """Whole backward: input gradient and weight gradient."""
    I = 2
    """Input gradient."""
    W = 3
    """Weight gradient."""
    R = 4
    """Recompute a stage's activations from its stored input."""
    OFFLOAD = 5
    """Copy a stage's activations to the host, or to another device's memory."""
    RELOAD = 6
    """Copy them back."""
    REDUCE = 7
    """Sum a stage's gradient over its replicas or its data-parallel peers."""
    STEP = 8
    """Update a stage's weights."""


STAGE_KINDS = frozenset({Kind.REDUCE, Kind.STEP})
"""Kinds of a stage only; the others also have a micro-batch and a slice."""

BESIDE_KINDS = (Kind.OFFLOAD, Kind.RELOAD, Kind.REDUCE)
"""Kinds that run beside the compute stream: what stands behind them on their
device waits for one only if it needs its result."""

BACKWARD_KINDS = (Kind.B, Kind.I)
"""Kinds that turn the gradient of a stage's output into that of its input."""

RESERVED_WORDS = ("GATHER", "RELEASE")
"""Words that later kinds will have (sharded weights); refused until then."""


class Op(NamedTuple):
    """One operation.

    Attributes:
        kind: what it does.
        stage: on which stage of the model.
        micro_batch: for which micro-batch, counted through all steps; for a
            kind of `STAGE_KINDS`, in which step.
        slice: which slice of the micro-batch along the sequence.
    """

    kind: Kind
    stage: int
    micro_batch: int = 0
    slice: int = 0

    def __str__(self) -> str:
        """As the text form writes it: `2F0`, `2F0.1`, `2REDUCE`."""
        if self.kind in STAGE_KINDS:
            return f"{self.stage}{self.kind.name}{self.micro_batch or ''}"
        return f"{self.stage}{self.short}"

    @property
    def short(self) -> str:
        """Without the stage: `F0`, for devices that hold only one."""
        if self.kind in STAGE_KINDS:
            return f"{self.kind.name}{self.micro_batch or ''}"
        part = f".{self.slice}" if self.slice else ""
        return f"{self.kind.name}{self.micro_batch}{part}"


@dataclass(frozen=True, eq=False)
class Ops(Sequence[Op]):
    """Operations in order, as columns.

    Attributes:
        kind: int8, values of `Kind`.
        stage, micro_batch, slice: int32, as in `Op`.
        joined: whether the op shares an overlap group with the one before.
    """

    kind: NDArray[np.int8]
    stage: Ints
    micro_batch: Ints
    slice: Ints
    joined: NDArray[np.bool_]

    def __post_init__(self) -> None:
        for column in self.columns():
            column.flags.writeable = False

    def columns(self) -> tuple[NDArray[Any], ...]:
        """All columns, in the order of the attributes."""
        return self.kind, self.stage, self.micro_batch, self.slice, self.joined

    @classmethod
    def of(cls, parts: Iterable[Op | Ops]) -> Ops:
        """Single ops and ranges of them, one after the other."""
        if isinstance(parts, Ops):  # its items would come without their groups
            return parts
        blocks: list[Ops] = []
        single: list[Op] = []
        for part in parts:
            if isinstance(part, Op):
                single.append(part)
                continue
            if not isinstance(part, Ops):
                raise ParameterError(
                    f"a row holds ops, found {part!r}: build them with F, B, I, W, "
                    "R, op or overlap"
                )
            if single:
                blocks.append(cls._from_ops(single))
                single = []
            blocks.append(part)
        if single or not blocks:
            blocks.append(cls._from_ops(single))
        if len(blocks) == 1:
            return blocks[0]
        return cls(*map(np.concatenate, zip(*(b.columns() for b in blocks))))

    @classmethod
    def _from_ops(cls, ops: Sequence[Op]) -> Ops:
        table = _whole([list(op) for op in ops]).reshape(len(ops), 4)
        _in_range(table[:, 1:])
        numbers = table.astype(np.int32)
        return cls(
            table[:, 0].astype(np.int8),
            numbers[:, 1].copy(),
            numbers[:, 2].copy(),
            numbers[:, 3].copy(),
            np.zeros(len(ops), dtype=np.bool_),
        )

    def grouped(self, joined: NDArray[np.bool_]) -> Ops:
        """The same ops in other overlap groups."""
        return Ops(self.kind, self.stage, self.micro_batch, self.slice, joined)

    def take(self, where: NDArray[Any]) -> Ops:
        """The ops at these positions (or under this mask), in that order."""
        return Ops(*(column[where] for column in self.columns()))

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Op: ...
    @overload
    def __getitem__(self, index: builtins.slice) -> Ops: ...
    def __getitem__(self, index: int | builtins.slice) -> Op | Ops:
        if isinstance(index, builtins.slice):
            return Ops(*(column[index].copy() for column in self.columns()))
        return Op(
            Kind(int(self.kind[index])),
            int(self.stage[index]),
            int(self.micro_batch[index]),
            int(self.slice[index]),
        )

    def __iter__(self) -> Iterator[Op]:
        for kind, *numbers in zip(*(column.tolist() for column in self.columns()[:4])):
            yield Op(Kind(kind), *numbers)

    def __add__(self, other: Ops) -> Ops:
        return Ops.of([self, other])


Many = Sequence[int] | NDArray[Any]
Numbers = int | Many


@overload
def op(kind: Kind, stage: int, micro_batch: int = 0, slice: int = 0) -> Op: ...
@overload
def op(
    kind: Kind, stage: Many, micro_batch: Numbers = 0, slice: Numbers = 0
) -> Ops: ...
@overload
def op(kind: Kind, stage: int, micro_batch: Many, slice: Numbers = 0) -> Ops: ...
@overload
def op(kind: Kind, stage: int, micro_batch: int, slice: Many) -> Ops: ...
def op(
    kind: Kind, stage: Numbers, micro_batch: Numbers = 0, slice: Numbers = 0
) -> Op | Ops:
    """Build one op, or many when any argument is a range or an array.

    Args:
        kind: of all of them.
        stage: one number, or as many as the longest argument.
        micro_batch: likewise; the step for a kind of `STAGE_KINDS`.
        slice: likewise; none for a kind of `STAGE_KINDS`.

    Raises:
        ParameterError: a number that is not whole, below 0 or above 2³¹-1, or
            ranges of different lengths.
    """
    arrays = [_whole(numbers) for numbers in (stage, micro_batch, slice)]
    for array in arrays:
        _in_range(array)
    if any(array.ndim > 1 for array in arrays):
        raise ParameterError(f"{kind.name}: give numbers, or one row of them")
    if all(array.ndim == 0 for array in arrays):
        return Op(kind, *(int(array) for array in arrays))
    try:
        columns = np.broadcast_arrays(*arrays)
    except ValueError:
        lengths = ", ".join(str(array.size) for array in arrays)
        raise ParameterError(
            f"{kind.name}: stages, micro-batches and slices of different lengths "
            f"({lengths}) do not pair up"
        ) from None
    stages, micro_batches, slices = (c.astype(np.int32) for c in columns)
    return Ops(
        np.full(len(stages), kind, dtype=np.int8),
        stages,
        micro_batches,
        slices,
        np.zeros(len(stages), dtype=np.bool_),
    )


class _Builder:
    """`op` with its kind filled in."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    @overload
    def __call__(self, stage: int, micro_batch: int, slice: int = 0) -> Op: ...
    @overload
    def __call__(
        self, stage: Many, micro_batch: Numbers, slice: Numbers = 0
    ) -> Ops: ...
    @overload
    def __call__(self, stage: int, micro_batch: Many, slice: Numbers = 0) -> Ops: ...
    @overload
    def __call__(self, stage: int, micro_batch: int, slice: Many) -> Ops: ...
    def __call__(self, stage: Any, micro_batch: Any, slice: Any = 0) -> Op | Ops:
        built: Op | Ops = op(self._kind, stage, micro_batch, slice)
        return built


F = _Builder(Kind.F)
B = _Builder(Kind.B)
I = _Builder(Kind.I)
W = _Builder(Kind.W)
R = _Builder(Kind.R)


def alternate(*parts: Op | Ops) -> Ops:
    """One op of each part in turn: `F0 B0 F1 B1 …`.

    Raises:
        ParameterError: no parts, parts of different lengths, or with overlap
            groups, which this would tear apart.
    """
    blocks = [Ops.of([part]) for part in parts]
    if any(block.joined.any() for block in blocks):
        raise ParameterError("alternate takes single ops, not overlap groups")
    return Ops(*_interleaved(blocks))


def overlap(*parts: Op | Ops) -> Ops:
    """Overlap groups: one of the parts' first ops, one of their second, and so on.

    Raises:
        ParameterError: fewer than two parts, or parts of different lengths.
    """
    if len(parts) < 2:
        raise ParameterError(f"an overlap group has at least two ops, got {len(parts)}")
    blocks = [Ops.of([part]) for part in parts]
    ops = Ops(*_interleaved(blocks))
    return ops.grouped(np.tile(np.arange(len(parts)) > 0, len(blocks[0])))


def _interleaved(parts: Sequence[Ops]) -> list[NDArray[Any]]:
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ParameterError(f"parts of the same length pair up, got lengths {lengths}")
    return [
        np.stack(column, axis=1).ravel()
        for column in zip(*(part.columns() for part in parts))
    ]


def _whole(numbers: Any) -> NDArray[Any]:
    """An array of integers, as the numbers are: nothing is rounded."""
    if isinstance(numbers, range):  # a hundred times as fast as through its items
        return np.arange(numbers.start, numbers.stop, numbers.step)
    array = np.asarray(numbers)
    if array.size and array.dtype.kind not in "iu":
        for number in array.ravel().tolist():
            if isinstance(number, bool) or not isinstance(number, int):
                raise ParameterError(
                    f"stages, micro-batches and slices are integers, got {number!r}"
                )
    return array


def _in_range(numbers: NDArray[Any]) -> None:
    if numbers.size and (numbers.min() < 0 or numbers.max() > MAX_NUMBER):
        wrong = numbers[(numbers < 0) | (numbers > MAX_NUMBER)].flat[0]
        raise ParameterError(
            f"stages, micro-batches and slices lie in 0 … {MAX_NUMBER}, got {wrong}"
        )
