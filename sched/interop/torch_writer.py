"""Schedules written as torch.distributed.pipelining's CSV.

What the two forms are, and what they cannot say, stands in `torch_csv`, which reads
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeproof.sched.deps import OpTable, order
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.instructions import Action, MessageKind
from pipeproof.sched.interop.torch_csv import KINDS, PAIRS, joined
from pipeproof.sched.ir import STAGE_KINDS, Kind, Op, Schedule
from pipeproof.sched.lower import lower
from pipeproof.sched.program import Program
from pipeproof.sched.skips import format_skips
from pipeproof.sched.ties import format_ties


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
        return joined(_with_communication(lower(schedule)))
    return joined(_compute_only(schedule, idle))


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
    if others := sorted(kinds - set(KINDS.values())):
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
        if len(group) != 2 or {op.kind for op in group} not in PAIRS:
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
