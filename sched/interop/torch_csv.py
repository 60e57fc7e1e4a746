"""torch.distributed.pipelining's CSV of a schedule, both forms, both ways.

    0F0,0F1,,0B0,0F2,0B1,0B2           compute-only: a row a rank, a cell a time
    1F0,1B0,1F1,1B1,1F2,1B2            step; an empty cell is an idle one

    0UNSHARD,0F0,0SEND_F0,…            with communication: what a rank does in
    1UNSHARD,1RECV_F0,1F0,…            order, with no idle cells

A cell is a stage, an action and a micro-batch. `F`, `I`, `W` mean what they mean
here, and so does `B`, the whole backward (torch's FULL_BACKWARD);
`(0F1;3B0)OVERLAP_F_B` is our `(0F1&3B0)`. `SEND_F`, `RECV_F`, `SEND_B`, `RECV_B`
name the stage that sends or receives: `0SEND_F2` is received as `1RECV_F2`.
`UNSHARD`, `RESHARD` and `REDUCE_GRAD` have no micro-batch.

*What the CSV does not say*, and where it comes from when one is read:

* The placement: stage s is on the rank whose row computes it, so linear, looped,
  V and any other map of one pipe come back as they were. A stage on two ranks,
  or a number below the highest that no rank computes, is refused.
* Stages and micro-batches: one more than the highest number; none of the numbers
  below may be unused.
* The name: an argument. It is no part of what a schedule is.
* Which of the two forms it is: with communication, if there is any such action.
  Then every tensor that crosses ranks needs its SEND behind the op that computes
  it and its RECV ahead of the op that needs it, no other may be there, and the
  k-th send from one rank to another must be the k-th receive, for that is how
  they pair up.

*What it cannot say* is refused in writing: several pipes, steps or slices, R,
OFFLOAD, RELOAD, REDUCE and STEP, groups other than a forward with a backward,
devices without ops, and what `check` finds wrong, as torch would.

*What a Schedule does not say*: idle cells, where communication lies among the
ops, UNSHARD, RESHARD and REDUCE_GRAD. `TorchCsv` keeps all of it, beside the
schedule, and writes the file back cell by cell. A schedule alone is written with
the communication of `lower`'s canonical order, a send and its receive at one
step of it: as received, so sent, on each pair of ranks in both directions. A
stage is then unsharded ahead of its first op, and behind its last its gradient
is reduced and its weights resharded.

Reading never runs code, accepts ASCII only, and bounds every size before it
allocates. Rows differ in length in torch's own files, and may.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeproof.sched.errors import ParseError
from pipeproof.sched.interop.torch_comms import Cell, Place, agree, belong
from pipeproof.sched.ir import Kind, Op, Ops, Schedule, check_name
from pipeproof.sched.placement import Placement
from pipeproof.sched.text import MAX_MICRO_BATCHES, MAX_TEXT_BYTES

MAX_RANKS = 1 << 16
MAX_STAGES = 1 << 20

_NUMBER = "0|[1-9][0-9]{0,6}"
KINDS = {"F": Kind.F, "B": Kind.B, "I": Kind.I, "W": Kind.W}
"""Letters of torch's compute actions, the same as ours."""
PAIRS = ({Kind.F, Kind.B}, {Kind.F, Kind.I})
"""What torch's OVERLAP_F_B can have."""

_ONE = re.compile(
    rf"(?P<stage>{_NUMBER})"
    rf"(?:(?P<word>[FBIW]|(?:SEND|RECV)_[FB])(?P<micro_batch>{_NUMBER})"
    r"|(?P<of_stage>UNSHARD|RESHARD|REDUCE_GRAD))",
    re.ASCII,
)
_GROUP = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B", re.ASCII)


@dataclass(frozen=True, slots=True)
class TorchCsv:
    """A file of torch's, whole.

    Attributes:
        schedule: what its compute actions say.
        rows: for each rank every cell, empty ones and communication included.
    """

    schedule: Schedule
    rows: tuple[tuple[str, ...], ...]

    @property
    def has_communication(self) -> bool:
        """Whether it has more than compute actions: torch's `compute_comms`."""
        return any("_" in cell or "SHARD" in cell for cell in self._plain_cells())

    def _plain_cells(self) -> Iterator[str]:
        return (cell for row in self.rows for cell in row if not cell.startswith("("))

    def cells(self) -> list[list[Cell]]:
        """For each rank its actions, each with its place; none for idle cells."""
        return _cells(self.rows)

    def format(self) -> str:
        """The file again: the same cells, a newline behind each row."""
        return joined(self.rows)


def parse_torch_csv(text: str, *, name: str = "torch-csv") -> Schedule:
    """The schedule that torch's CSV says, in either form.

    Args:
        text: the whole file.
        name: a label for the schedule.

    Raises:
        ParseError: with row and column (of cells, from 1), what was expected and
            found.
    """
    return read_torch_csv(text, name=name).schedule


def read_torch_csv(
    text: str, *, name: str = "torch-csv", agreeing: bool = True
) -> TorchCsv:
    """The schedule, and all else that the file says.

    Args:
        text: the whole file.
        name: a label for the schedule.
        agreeing: refuse transfers that are not what the ops imply, or do not pair
            up; otherwise they are left for `torch_program` and `prove` to judge.

    Raises:
        ParseError: as `parse_torch_csv`.
    """
    check_name(name)
    if len(text) > MAX_TEXT_BYTES:
        raise ParseError(
            f"CSV of {len(text):,} characters exceeds {MAX_TEXT_BYTES:,}: generate "
            "so long a schedule instead of reading it"
        )
    rows = _rows(text)
    parsed = _cells(rows)
    for number, cells in enumerate(parsed, start=1):
        if not any(cell.ops for cell in cells):
            raise ParseError(
                f"row {number}: expected what a rank computes, found nothing: torch "
                "takes every row for a rank"
            )
    _once(parsed)
    home = _homes(parsed)
    micro_batches = _count(parsed)
    if any(not cell.ops for cells in parsed for cell in cells):
        _no_idle(rows)
        belong(parsed, home)
        if agreeing:
            agree(parsed, home)
    schedule = Schedule.of(
        [_ops_of(cells) for cells in parsed],
        name=name,
        placement=Placement((tuple(home),)),
        micro_batches=micro_batches,
        slices=1,
    )
    return TorchCsv(schedule, rows)


def joined(rows: Sequence[Sequence[str]]) -> str:
    """The file of these cells, a newline behind each row."""
    return "".join(",".join(row) + "\n" for row in rows)


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ParseError("expected a row for each rank, found an empty file")
    if len(lines) > MAX_RANKS:
        raise ParseError(f"{len(lines):,} rows exceed {MAX_RANKS:,} ranks")
    return tuple(
        tuple(cell.strip(" ") for cell in line.removesuffix("\r").split(","))
        for line in lines
    )


def _cells(rows: tuple[tuple[str, ...], ...]) -> list[list[Cell]]:
    return [
        [
            _cell(Place(r, c), word)
            for c, word in enumerate(row, start=1)
            if word  # an empty cell is idle
        ]
        for r, row in enumerate(rows, start=1)
    ]


def _cell(place: Place, word: str) -> Cell:
    if not word.startswith("("):
        return _single(place, word, word)
    match = _GROUP.fullmatch(word)
    if not match:
        raise place.wrong("a group as (0F1;3B0)OVERLAP_F_B", word)
    members = [_single(place, part.strip(" "), word) for part in match.groups()]
    ops = tuple(op for member in members for op in member.ops)
    if {op.kind for op in ops} not in PAIRS:
        raise place.wrong("a forward and a backward (F, and B or I) in a group", word)
    return Cell(place, word, ops, "", -1, -1)


def _single(place: Place, word: str, whole: str) -> Cell:
    match = _ONE.fullmatch(word)
    if not match:
        raise place.wrong(
            "an action such as 2F0, 2SEND_F0, 2UNSHARD or (0F1;3B0)OVERLAP_F_B", whole
        )
    stage, micro_batch = int(match["stage"]), int(match["micro_batch"] or 0)
    if stage >= MAX_STAGES:
        raise place.wrong(f"a stage below {MAX_STAGES:,}", whole)
    if micro_batch >= MAX_MICRO_BATCHES:
        raise place.wrong(f"a micro-batch below {MAX_MICRO_BATCHES:,}", whole)
    kind = KINDS.get(match["word"] or "")
    if kind is not None:
        return Cell(place, word, (Op(kind, stage, micro_batch),), "", stage, -1)
    if match["of_stage"]:
        return Cell(place, word, (), match["of_stage"], stage, -1)
    return Cell(place, word, (), match["word"], stage, micro_batch)


def _once(rows: list[list[Cell]]) -> None:
    """No op or transfer stands twice."""
    seen: dict[Op | str, Place] = {}
    for cell in (cell for row in rows for cell in row):
        if cell.action in ("UNSHARD", "RESHARD"):
            continue
        for key in cell.ops or (cell.word,):
            first = seen.setdefault(key, cell.place)
            if first is not cell.place:
                raise cell.place.wrong(
                    f"each action once, and {key} stands in {first}", cell.word
                )


def _homes(rows: list[list[Cell]]) -> list[int]:
    """The rank that computes each stage."""
    first: dict[int, tuple[int, Cell]] = {}
    for rank, row in enumerate(rows):
        for cell in row:
            for op in cell.ops:
                home, other = first.setdefault(op.stage, (rank, cell))
                if home != rank:
                    raise cell.place.wrong(
                        f"stage {op.stage} on rank {home} only, as in {other.place}",
                        cell.word,
                    )
    for place, stage in enumerate(sorted(first)):
        if place != stage:
            cell = first[max(first)][1]
            raise cell.place.wrong(
                f"stages 0 … {len(first) - 1}, as many as are computed (no rank "
                f"computes stage {place})",
                cell.word,
            )
    for cell in (cell for row in rows for cell in row):
        if not cell.ops and cell.stage not in first:
            raise cell.place.wrong(
                f"a stage of 0 … {len(first) - 1}, those computed", cell.word
            )
    return [first[stage][0] for stage in range(len(first))]


def _count(rows: list[list[Cell]]) -> int:
    """How many micro-batches there are."""
    seen: dict[int, Cell] = {}
    for cell in (cell for row in rows for cell in row):
        for op in cell.ops:
            seen.setdefault(op.micro_batch, cell)
    for place, micro_batch in enumerate(sorted(seen)):
        if place != micro_batch:
            cell = seen[max(seen)]
            raise cell.place.wrong(
                f"micro-batches 0 … {len(seen) - 1}, as many as are computed (no "
                f"rank computes micro-batch {place})",
                cell.word,
            )
    return len(seen)


def _no_idle(rows: tuple[tuple[str, ...], ...]) -> None:
    for r, row in enumerate(rows, start=1):
        if "" in row:
            raise Place(r, row.index("") + 1).wrong(
                "no idle cells among communication, as torch", ""
            )


def _ops_of(cells: list[Cell]) -> list[Ops]:
    joined = [index > 0 for cell in cells for index in range(len(cell.ops))]
    ops = Ops.of([op for cell in cells for op in cell.ops])
    return [ops.grouped(np.array(joined, dtype=np.bool_))]
