"""The schedule: for each device, the order of its operations.

A schedule is data. Generators write it, `check` judges it, `lower` turns it
into device programs, `sim` times those and `exec` obeys them. Nothing here
knows a schedule by its name.

Operations are stored as columns of integers, so that ten million of them fit
well under a gibibyte; an `Op` is a view of one row of the columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.placement import Placement

if TYPE_CHECKING:
    from pipeproof.sched.check import Report

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
    """Copy a stage's activations to the host."""
    RELOAD = 6
    """Copy them back."""
    REDUCE = 7
    """Sum a stage's gradient over its replicas or its data-parallel peers."""
    STEP = 8
    """Update a stage's weights."""


STAGE_KINDS = frozenset({Kind.REDUCE, Kind.STEP})
"""Kinds of a stage only; the others also have a micro-batch and a slice."""

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
        table = np.array(ops, dtype=np.int64).reshape(len(ops), 4)
        _in_range(table[:, 1:])
        numbers = table.astype(np.int32)
        return cls(
            table[:, 0].astype(np.int8),
            numbers[:, 1].copy(),
            numbers[:, 2].copy(),
            numbers[:, 3].copy(),
            np.zeros(len(ops), dtype=np.bool_),
        )

    def take(self, where: NDArray[Any]) -> Ops:
        """The ops at these positions (or under this mask), in that order."""
        return Ops(*(column[where] for column in self.columns()))

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Op: ...
    @overload
    def __getitem__(self, index: slice) -> Ops: ...
    def __getitem__(self, index: int | slice) -> Op | Ops:
        if isinstance(index, slice):
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


Numbers = int | Sequence[int] | NDArray[Any]


@overload
def op(kind: Kind, stage: int, micro_batch: int = 0, slice: int = 0) -> Op: ...
@overload
def op(
    kind: Kind, stage: Numbers, micro_batch: Numbers = 0, slice: Numbers = 0
) -> Op | Ops: ...
def op(
    kind: Kind, stage: Numbers, micro_batch: Numbers = 0, slice: Numbers = 0
) -> Op | Ops:
    """Build one op, or many when any argument is a range or an array.

    Args:
        kind: of all of them.
        stage: one number, or as many as the longest argument.
        micro_batch: likewise; the step for a kind of `STAGE_KINDS`.
        slice: likewise.

    Raises:
        ParameterError: a number below 0 or above 2³¹-1, or ranges of
            different lengths.
    """
    if isinstance(stage, int) and isinstance(micro_batch, int):
        if isinstance(slice, int):
            if min(stage, micro_batch, slice) < 0:
                _in_range(np.array([stage, micro_batch, slice]))
            return Op(kind, stage, micro_batch, slice)
    arrays = [np.asarray(numbers, np.int64) for numbers in (stage, micro_batch, slice)]
    try:
        columns = np.broadcast_arrays(*arrays)
    except ValueError:
        lengths = ", ".join(str(array.size) for array in arrays)
        raise ParameterError(
            f"{kind.name}: stages, micro-batches and slices of different lengths "
            f"({lengths}) do not pair up"
        ) from None
    for column in columns:
        _in_range(column)
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
        self, stage: Numbers, micro_batch: Numbers, slice: Numbers = 0
    ) -> Ops: ...
    def __call__(
        self, stage: Numbers, micro_batch: Numbers, slice: Numbers = 0
    ) -> Op | Ops:
        return op(self._kind, stage, micro_batch, slice)


F = _Builder(Kind.F)
B = _Builder(Kind.B)
I = _Builder(Kind.I)
W = _Builder(Kind.W)
R = _Builder(Kind.R)


def alternate(*parts: Ops) -> Ops:
    """One op of each part in turn: `F0 B0 F1 B1 …`.

    Raises:
        ParameterError: parts of different lengths.
    """
    return _interleave(parts, joined=False)


def overlap(*parts: Op | Ops) -> Ops:
    """Overlap groups: the parts' first ops share the device, then their second, …

    Raises:
        ParameterError: fewer than two parts, or parts of different lengths.
    """
    if len(parts) < 2:
        raise ParameterError(f"an overlap group has at least two ops, got {len(parts)}")
    return _interleave([Ops.of([part]) for part in parts], joined=True)


def _interleave(parts: Sequence[Ops], *, joined: bool) -> Ops:
    lengths = {len(part) for part in parts}
    if len(lengths) != 1:
        raise ParameterError(f"parts of different lengths do not pair up: {lengths}")
    columns = [
        np.stack(column, axis=1).ravel()
        for column in zip(*(p.columns() for p in parts))
    ]
    if joined:
        columns[4] = np.tile(np.arange(len(parts)) > 0, lengths.pop())
    return Ops(*columns)


def _in_range(numbers: NDArray[Any]) -> None:
    if numbers.size and (numbers.min() < 0 or numbers.max() > MAX_NUMBER):
        wrong = numbers[(numbers < 0) | (numbers > MAX_NUMBER)].flat[0]
        raise ParameterError(
            f"stages, micro-batches and slices lie in 0 … {MAX_NUMBER}, got {wrong}"
        )


@dataclass(frozen=True, eq=False)
class Schedule:
    """For each device, the order of its operations, and where stages live.

    Immutable. Two schedules are equal when all but their names are.

    Attributes:
        name: a label for people; not part of what the schedule is.
        placement: (pipe, stage) → device.
        micro_batches: M, in each step.
        slices: Q, slices of a micro-batch along the sequence.
        steps: training steps that this schedule spans.
        pipe_of: int16, the pipe that each of the steps × M micro-batches
            travels.
        ops: all operations, device by device.
        row_starts: int64 of length devices + 1; device d has
            `ops[row_starts[d]:row_starts[d + 1]]`.
    """

    name: str
    placement: Placement
    micro_batches: int
    slices: int
    steps: int
    pipe_of: NDArray[np.int16]
    ops: Ops
    row_starts: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        rows: Sequence[Iterable[Op | Ops]],
        *,
        name: str = "schedule",
        placement: Placement | None = None,
        micro_batches: int | None = None,
        slices: int | None = None,
        steps: int = 1,
        pipe_of: Sequence[int] | NDArray[Any] | None = None,
    ) -> Schedule:
        """A schedule from one row of ops for each device.

        Only what cannot even be stored is refused here; `check` judges the rest.

        Args:
            rows: for each device, ops or ranges of ops in order.
            name: a label, one line.
            placement: default linear, stage s on device s.
            micro_batches: M; default as many as the ops name.
            slices: Q; default as many as the ops name.
            steps: training steps spanned.
            pipe_of: the pipe of each micro-batch; needed with more than one pipe.

        Raises:
            ParameterError: no rows, more rows than the placement has devices or
                fewer, a size below 1, or pipes that do not fit.
        """
        if not rows:
            raise ParameterError("a schedule needs at least one device, got no rows")
        if not name or name != name.strip() or not name.isprintable():
            raise ParameterError(f"name must be printable and on one line: {name!r}")
        placement = placement or Placement.linear(len(rows))
        if placement.devices > len(rows):
            raise ParameterError(
                f"the placement uses {placement.devices} devices, found "
                f"{len(rows)} rows: give each device a row, if an empty one"
            )
        blocks = [Ops.of(row) for row in rows]
        for device, block in enumerate(blocks):
            if len(block) and block.joined[0]:
                raise ParameterError(
                    f"row {device} opens inside an overlap group, with {block[0]}: "
                    "give it the whole group"
                )
        ops = Ops.of(blocks)
        starts = np.cumsum([0] + [len(block) for block in blocks], dtype=np.int64)
        starts.flags.writeable = False
        named = ~np.isin(ops.kind, list(STAGE_KINDS))
        if micro_batches is None:
            highest = int(ops.micro_batch[named].max(initial=0))
            micro_batches = -(-(highest + 1) // steps)
        if slices is None:
            slices = int(ops.slice.max(initial=0)) + 1
        for what, size in (
            ("micro_batches", micro_batches),
            ("slices", slices),
            ("steps", steps),
        ):
            if not 1 <= size <= MAX_NUMBER:
                raise ParameterError(f"{what} must be at least 1, got {size}")
        return cls(
            name,
            placement,
            micro_batches,
            slices,
            steps,
            _pipes(pipe_of, len(placement.pipes), micro_batches * steps),
            ops,
            starts,
        )

    @property
    def devices(self) -> int:
        """P."""
        return len(self.row_starts) - 1

    @property
    def stages(self) -> int:
        """S."""
        return self.placement.stages

    @property
    def all_micro_batches(self) -> int:
        """Micro-batches of all steps."""
        return self.micro_batches * self.steps

    def row(self, device: int) -> Ops:
        """The ops of one device, in order."""
        return self.ops[int(self.row_starts[device]) : int(self.row_starts[device + 1])]

    @cached_property
    def device_of_op(self) -> Ints:
        """int32, the device of each op."""
        counts = np.diff(self.row_starts)
        return np.repeat(np.arange(self.devices, dtype=np.int32), counts)

    @cached_property
    def node_of_op(self) -> NDArray[np.int64]:
        """The number of each op's overlap group; a lone op is a group of one."""
        return np.cumsum(~self.ops.joined) - 1

    def has(self, kind: Kind) -> bool:
        """Whether any op is of this kind."""
        return bool((self.ops.kind == kind).any())

    def locate(self, index: int) -> tuple[int, int]:
        """Device and step (position in its row) of the op at `index`."""
        device = int(self.device_of_op[index])
        return device, index - int(self.row_starts[device])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all but the name; ranks compare it before they start."""
        sha = hashlib.sha256(b"pipeproof schedule 1\n")
        sizes = (self.micro_batches, self.slices, self.steps, self.devices)
        sha.update(repr((self.placement.pipes, sizes)).encode())
        for column in (self.pipe_of, self.row_starts, *self.ops.columns()):
            sha.update(np.ascontiguousarray(column, column.dtype.newbyteorder("<")))
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        """Number of ops on all devices."""
        return len(self.ops)

    def __repr__(self) -> str:
        return f"<Schedule {self.summary}, {len(self):,} ops>"

    @property
    def summary(self) -> str:
        """Name and sizes, for messages."""
        parts = [f"devices={self.devices}"]
        if self.stages != self.devices:
            parts.append(f"stages={self.stages}")
        parts.append(f"micro_batches={self.micro_batches}")
        if self.slices > 1:
            parts.append(f"slices={self.slices}")
        if self.steps > 1:
            parts.append(f"steps={self.steps}")
        return f"{self.name}({', '.join(parts)})"

    def renamed(self, name: str) -> Schedule:
        """The same schedule under another label."""
        return Schedule(
            name,
            self.placement,
            self.micro_batches,
            self.slices,
            self.steps,
            self.pipe_of,
            self.ops,
            self.row_starts,
        )

    def with_rows(self, rows: Sequence[Iterable[Op | Ops]], name: str = "") -> Schedule:
        """Other rows of ops for the same model, placement and sizes."""
        return Schedule.of(
            rows,
            name=name or self.name,
            placement=self.placement,
            micro_batches=self.micro_batches,
            slices=self.slices,
            steps=self.steps,
            pipe_of=self.pipe_of,
        )

    @cached_property
    def report(self) -> Report:
        """What `check` finds, worked out once: a schedule cannot change."""
        from pipeproof.sched.check import examine

        return examine(self)

    def format(self) -> str:
        """The text form; `Schedule.parse` reads it back to the letter."""
        from pipeproof.sched.text import format_schedule

        return format_schedule(self)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read the text form.

        Raises:
            ParseError: with line and column, what was expected and found.
        """
        from pipeproof.sched.text import parse_schedule

        return parse_schedule(text)


def _pipes(
    pipe_of: Sequence[int] | NDArray[Any] | None, pipes: int, micro_batches: int
) -> NDArray[np.int16]:
    if pipe_of is None:
        if pipes > 1:
            raise ParameterError(
                f"the placement has {pipes} pipes: say with pipe_of which one each "
                "micro-batch travels"
            )
        pipe_of = np.zeros(micro_batches, dtype=np.int16)
    result = np.array(pipe_of, dtype=np.int16)
    if result.shape != (micro_batches,):
        raise ParameterError(
            f"pipe_of names the pipe of {result.size} micro-batches, expected "
            f"{micro_batches}"
        )
    if result.min() < 0 or result.max() >= pipes:
        raise ParameterError(f"pipe_of: pipes lie in 0 … {pipes - 1}")
    result.flags.writeable = False
    return result
