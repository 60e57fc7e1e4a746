"""The schedule: for each device, the order of its operations.

A schedule is data. Generators write it, `check` judges it, `lower` turns it
into device programs, `sim` times those and `exec` obeys them. Nothing here
knows a schedule by its name.

Operations are stored as columns of integers (`ops.py`), so that ten million of
them fit well under a gibibyte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.ops import BACKWARD_KINDS as BACKWARD_KINDS
from pipeproof.sched.ops import BESIDE_KINDS as BESIDE_KINDS
from pipeproof.sched.ops import MAX_NUMBER as MAX_NUMBER
from pipeproof.sched.ops import RESERVED_WORDS as RESERVED_WORDS
from pipeproof.sched.ops import STAGE_KINDS as STAGE_KINDS
from pipeproof.sched.ops import B as B
from pipeproof.sched.ops import F as F
from pipeproof.sched.ops import I as I
from pipeproof.sched.ops import Ints as Ints
from pipeproof.sched.ops import Kind as Kind
from pipeproof.sched.ops import Op as Op
from pipeproof.sched.ops import Ops as Ops
from pipeproof.sched.ops import R as R
from pipeproof.sched.ops import W as W
from pipeproof.sched.ops import alternate as alternate
from pipeproof.sched.ops import op as op
from pipeproof.sched.ops import overlap as overlap
from pipeproof.sched.placement import Placement as Placement
from pipeproof.sched.skips import Skip as Skip
from pipeproof.sched.skips import listed
from pipeproof.sched.ties import Tie as Tie
from pipeproof.sched.ties import listed as listed_ties

if TYPE_CHECKING:
    from pipeproof.sched.deps import OpTable
    from pipeproof.sched.findings import Report


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
        offload_to: for each device, the device whose memory takes what it
            OFFLOADs; None for the host's.
        skips: pairs of stages of which one hands tensors straight to the other, in
            order; see `skips`.
        ties: groups of stages that share parameters, in order; see `ties`.
    """

    name: str
    placement: Placement
    micro_batches: int
    slices: int
    steps: int
    pipe_of: NDArray[np.int16]
    ops: Ops
    row_starts: NDArray[np.int64]
    offload_to: tuple[int | None, ...]
    skips: tuple[Skip, ...] = ()
    ties: tuple[Tie, ...] = ()

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
        offload_to: Sequence[int | None] | None = None,
        skips: Iterable[Skip] = (),
        ties: Iterable[Tie] = (),
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
            offload_to: for each device, where its OFFLOADs go: a device, or None
                for the host; default the host for all.
            skips: pairs (stage, later stage): what the first makes goes straight to
                the second, past those between.
            ties: groups of stages that share parameters.

        Raises:
            ParameterError: no rows, more rows than the placement has devices or
                fewer, a size below 1, pipes or an offload_to that do not fit,
                skips that are no pairs, or ties that are no groups.
        """
        if not rows:
            raise ParameterError("a schedule needs at least one device, got no rows")
        check_name(name)
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
        if (ops.slice[~named] != 0).any():
            raise ParameterError(
                "an op of a stage, such as REDUCE or STEP, has no slice other than 0"
            )
        at_least_one(steps=steps)
        if micro_batches is None:
            highest = int(ops.micro_batch[named].max(initial=0))
            micro_batches = -(-(highest + 1) // steps)
        if slices is None:
            slices = int(ops.slice.max(initial=0)) + 1
        at_least_one(micro_batches=micro_batches, slices=slices)
        if max(micro_batches * steps, slices) > MAX_NUMBER:
            raise ParameterError(
                f"steps × micro_batches, and slices, reach at most {MAX_NUMBER}, got "
                f"{steps} × {micro_batches} and {slices}"
            )
        return cls(
            name,
            placement,
            micro_batches,
            slices,
            steps,
            _pipes(pipe_of, len(placement.pipes), micro_batches * steps),
            ops,
            starts,
            _targets(offload_to, len(rows)),
            listed(skips),
            listed_ties(ties),
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
    def node_of_op(self) -> Ints:
        """int32, the number of each op's overlap group; a lone op is a group of one."""
        return np.cumsum(~self.ops.joined, dtype=np.int32) - 1

    @cached_property
    def level_of_node(self) -> Ints:
        """int32, the tick at which each group could run; see `deps.Order.level`.

        Kept, since `check` and `lower` both need it. Ops must be in range.
        """
        from pipeproof.sched.deps import order

        if self.clean_levels is not None:
            return self.clean_levels
        return order(self, self.table).level.astype(np.int32)

    @cached_property
    def clean_levels(self) -> Ints | None:
        """The same where a quick look says that `check` finds nothing; else None."""
        from pipeproof.sched.clean import clean_levels

        return clean_levels(self)

    @cached_property
    def table(self) -> OpTable:
        """Where each op stands. Ops must be in range."""
        from pipeproof.sched.deps import OpTable

        return OpTable.of(self)

    @cached_property
    def only_stage(self) -> list[int]:
        """For each device the one stage it holds, or -1: `2F0` can be `F0` there."""
        holds: list[set[int]] = [set() for _ in range(self.devices)]
        for pipe in self.placement.pipes:
            for stage, device in enumerate(pipe):
                holds[device].add(stage)
        return [stages.pop() if len(stages) == 1 else -1 for stages in holds]

    def has(self, kind: Kind) -> bool:
        """Whether any op is of this kind."""
        return kind <= self._last_kind and bool((self.ops.kind == kind).any())

    @cached_property
    def _last_kind(self) -> int:
        return int(self.ops.kind.max(initial=-1))

    @property
    def offloads_to_devices(self) -> bool:
        """Whether `offload_to` names any device."""
        return any(target is not None for target in self.offload_to)

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
        if self.offloads_to_devices:
            sha.update(repr(self.offload_to).encode())
        if self.skips:
            sha.update(repr(self.skips).encode())
        if self.ties:
            sha.update(f"ties {self.ties}".encode())
        columns: list[NDArray[Any]] = [self.pipe_of, self.row_starts]
        for column in columns + list(self.ops.columns()):
            sha.update(column.astype(column.dtype.newbyteorder("<")).data)
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
        check_name(name)
        return replace(self, name=name)

    def with_skips(self, skips: Iterable[Skip]) -> Schedule:
        """The same schedule of a model with these skip connections."""
        return replace(self, skips=listed(skips))

    def with_ties(self, ties: Iterable[Tie]) -> Schedule:
        """The same schedule of a model whose stages share parameters so."""
        return replace(self, ties=listed_ties(ties))

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
            offload_to=self.offload_to,
            skips=self.skips,
            ties=self.ties,
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


def check_name(name: str) -> None:
    """Refuse what would not fit on a line of text.

    Raises:
        ParameterError: an empty name, or one with control characters.
    """
    if not name or name != name.strip() or not name.isprintable():
        raise ParameterError(f"name must be printable and on one line: {name!r}")


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
    result = np.array(pipe_of)
    if result.shape != (micro_batches,):
        raise ParameterError(
            f"pipe_of names the pipe of {result.size} micro-batches, expected "
            f"{micro_batches}"
        )
    if result.dtype.kind not in "iu" or result.min() < 0 or result.max() >= pipes:
        raise ParameterError(f"pipe_of: pipes are numbers from 0 to {pipes - 1}")
    numbers = result.astype(np.int16)
    numbers.flags.writeable = False
    return numbers


def _targets(
    offload_to: Sequence[int | None] | None, devices: int
) -> tuple[int | None, ...]:
    if offload_to is None:
        return (None,) * devices
    targets = tuple(offload_to)
    if len(targets) != devices:
        raise ParameterError(
            f"offload_to says where the OFFLOADs of {len(targets)} devices go, "
            f"expected {devices}"
        )
    for device, target in enumerate(targets):
        if target is not None and (
            type(target) is not int or not 0 <= target <= MAX_NUMBER
        ):
            raise ParameterError(
                f"offload_to: device {device} names {target!r}, expected the number "
                "of a device, or None for the host"
            )
    return targets
