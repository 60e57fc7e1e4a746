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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeproof.sched.deps import OpTable, order
from pipeproof.sched.errors import ParameterError, ParseError, UnsupportedError
from pipeproof.sched.interop.torch_comms import Cell, Place, agree, belong
from pipeproof.sched.ir import STAGE_KINDS, Kind, Op, Ops, Schedule, check_name
from pipeproof.sched.lower import lower
from pipeproof.sched.placement import Placement
from pipeproof.sched.program import Action, MessageKind, Program
from pipeproof.sched.skips import format_skips
from pipeproof.sched.text import MAX_MICRO_BATCHES, MAX_TEXT_BYTES
from pipeproof.sched.ties import format_ties

MAX_RANKS = 1 << 16
MAX_STAGES = 1 << 20

_NUMBER = "0|[1-9][0-9]{0,6}"
_COMPUTE = {"F": Kind.F, "B": Kind.B, "I": Kind.I, "W": Kind.W}
_ONE = re.compile(
    rf"(?P<stage>{_NUMBER})"
    rf"(?:(?P<word>[FBIW]|(?:SEND|RECV)_[FB])(?P<micro_batch>{_NUMBER})"
    r"|(?P<of_stage>UNSHARD|RESHARD|REDUCE_GRAD))",
    re.ASCII,
)
_GROUP = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B", re.ASCII)
_PAIRS = ({Kind.F, Kind.B}, {Kind.F, Kind.I})


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
        return _joined(self.rows)


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


def format_torch_csv(
    schedule: Schedule, *, communication: bool = False, idle: bool = False
) -> str:
    """A schedule as torch's `_load_csv` reads it.

    Args:
        schedule: one that `check` finds clean.
        communication: torch's `format="compute_comms"`; else `"compute_only"`, to
            which torch adds communication itself.
        idle: empty cells where a rank waits, every op taking one time step, so
            that columns are time steps; only without communication.

    Raises:
        ScheduleError: `check` has findings.
        UnsupportedError: the CSV cannot say it.
        ParameterError: idle cells among communication.
    """
    if communication and idle:
        raise ParameterError("torch accepts idle cells only without communication")
    schedule.report.raise_if_bad()
    _sayable(schedule)
    if communication:
        return _joined(_with_communication(lower(schedule)))
    return _joined(_compute_only(schedule, idle))


def _joined(rows: tuple[tuple[str, ...], ...] | list[list[str]]) -> str:
    return "".join(",".join(row) + "\n" for row in rows)


# Reading


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
    if {op.kind for op in ops} not in _PAIRS:
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
    kind = _COMPUTE.get(match["word"] or "")
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


# Writing


def _sayable(schedule: Schedule) -> None:
    sizes = {
        "pipes": len(schedule.placement.pipes),
        "steps": schedule.steps,
        "slices": schedule.slices,
    }
    for what, size in sizes.items():
        if size > 1:
            raise UnsupportedError(
                f"{schedule.summary}: torch's CSV has no {what}, found {size} of "
                "them; the text form and JSON have"
            )
    if schedule.skips:
        raise UnsupportedError(
            f"{schedule.summary}: torch's CSV has no skip connections, found "
            f"{format_skips(schedule.skips)}; the text form and JSON have"
        )
    if schedule.ties:
        raise UnsupportedError(
            f"{schedule.summary}: torch's CSV has no ties, found "
            f"{format_ties(schedule.ties)}; the text form and JSON have"
        )
    kinds = {Kind(kind) for kind in np.unique(schedule.ops.kind).tolist()}
    if others := sorted(kinds - set(_COMPUTE.values())):
        names = ", ".join(kind.name for kind in others)
        hint = "; recompute(…, 'never') takes R out" if Kind.R in others else ""
        if STAGE_KINDS & kinds:
            hint += "; torch reduces by itself, and steps in the training loop"
        raise UnsupportedError(
            f"{schedule.summary}: torch's CSV has no {names}, only F, B, I and W{hint}"
        )
    empty = np.flatnonzero(np.diff(schedule.row_starts) == 0)
    if len(empty):
        raise UnsupportedError(
            f"{schedule.summary}: torch gives every rank something to compute, "
            f"device {empty[0]} has no ops"
        )
    starts = np.flatnonzero(~schedule.ops.joined)
    sizes_of_groups = np.diff(np.append(starts, len(schedule)))
    for first in starts[sizes_of_groups > 1].tolist():
        group = _group(schedule, first)
        if len(group) != 2 or {op.kind for op in group} not in _PAIRS:
            device, step = schedule.locate(first)
            raise UnsupportedError(
                f"device {device}, step {step}: torch overlaps one forward with one "
                f"backward, found ({'&'.join(map(str, group))})"
            )


def _group(schedule: Schedule, first: int) -> list[Op]:
    """The ops of the group that opens at an index."""
    last = first + 1
    while last < len(schedule) and schedule.ops.joined[last]:
        last += 1
    return list(schedule.ops[first:last])


def _word(ops: list[Op] | tuple[Op, ...]) -> str:
    if len(ops) == 1:
        return str(ops[0])
    return f"({';'.join(map(str, ops))})OVERLAP_F_B"


class _Node(NamedTuple):
    device: int
    level: int
    word: str


def _nodes(schedule: Schedule) -> Iterator[_Node]:
    graph = order(schedule, OpTable.of(schedule))
    ends = [*graph.first_op[1:].tolist(), len(schedule)]
    device = schedule.device_of_op[graph.first_op].tolist()
    ops = list(schedule.ops)
    for first, end, where, level in zip(
        graph.first_op.tolist(), ends, device, graph.level.tolist()
    ):
        yield _Node(where, level, _word(ops[first:end]))


def _compute_only(schedule: Schedule, idle: bool) -> list[list[str]]:
    rows: list[list[str]] = [[] for _ in range(schedule.devices)]
    for node in _nodes(schedule):
        row = rows[node.device]
        if idle:
            row += [""] * (node.level - len(row))
        row.append(node.word)
    if idle:
        steps = max(map(len, rows))
        rows = [row + [""] * (steps - len(row)) for row in rows]
    return rows


def _with_communication(program: Program) -> list[list[str]]:
    """Each device's instructions in the program's one order, on one stream."""
    schedule = program.schedule
    ops = list(schedule.ops)
    left = np.bincount(schedule.ops.stage, minlength=schedule.stages).tolist()
    whole = list(left)
    rows: list[list[str]] = [[] for _ in range(schedule.devices)]
    device, action = program.device.tolist(), program.action.tolist()
    first, count = program.first_op.tolist(), program.op_count.tolist()
    messages, message = program.messages.tolist(), program.message.tolist()
    done: list[list[str]] = [[] for _ in range(schedule.devices)]
    for i in range(len(program)):
        row = rows[device[i]]
        if action[i] == Action.COMPUTE:
            _close(row, done[device[i]])
            members = ops[first[i] : first[i] + count[i]]
            for stage in (op.stage for op in members):
                if left[stage] == whole[stage]:
                    row.append(f"{stage}UNSHARD")
                left[stage] -= 1
                if not left[stage]:
                    done[device[i]] += [f"{stage}REDUCE_GRAD", f"{stage}RESHARD"]
            row.append(_word(members))
        elif action[i] != Action.LOCAL:
            kind, source, target, _, micro_batch, *_ = messages[message[i]]
            letter = "F" if kind == MessageKind.ACTIVATION else "B"
            sends = action[i] == Action.SEND
            verb, stage = ("SEND", source) if sends else ("RECV", target)
            row.append(f"{stage}{verb}_{letter}{micro_batch}")
    for row, closing in zip(rows, done):
        _close(row, closing)
    return rows


def _close(row: list[str], closing: list[str]) -> None:
    """Reduce and reshard finished stages, behind the sends of their last op."""
    row += closing
    closing.clear()
