"""Every edit of one op of a schedule."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from interpreter import Interpreter, Rows
from strategies import rows_of
from tally import Tallies, Tally
from torch import nn
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.exec import reference as unpipelined
from pipeproof.sched import Kind, Op, Schedule, check, overlap
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.ir import STAGE_KINDS

Edit = tuple[str, str, Any]


def edits_of_schedule(schedule: Schedule) -> Iterator[Edit]:
    """(kind of edit, in words, rows) of every edit of one op or group."""
    rows = rows_of(schedule)
    for device, row in enumerate(rows):
        for at, group in enumerate(row):
            what = f"{'&'.join(map(str, group))} at {at} of device {device}"

            def edited(
                new: list[list[Op]], *, at: int = at, device: int = device, to: int = -1
            ) -> Rows:
                result = [list(row) for row in rows]
                result[device][at : at + 1] = new
                if to >= 0:
                    result[device].insert(to, rows[device][at])
                return result

            reduces = group[0].kind == Kind.REDUCE
            yield "drop a REDUCE" if reduces else "drop", what, edited([])
            for to in range(len(row) + 1):
                yield "double", f"{what}, to {to}", edited([group], to=to)
            for to in range(at):
                swapped = [list(row) for row in rows]
                swapped[device][at], swapped[device][to] = row[to], row[at]
                yield "swap", f"{what} with {to}", swapped
            for other in range(len(rows)):
                for to in range(len(rows[other]) + 1) if other != device else ():
                    moved = edited([])
                    moved[other].insert(to, group)
                    yield "to another device", f"{what} to {to} of {other}", moved
            if reduces:
                for to in range(at - 1):
                    early = edited([])
                    early[device].insert(to, group)
                    yield "early REDUCE", f"{what} to {to}", early
            for place, op in enumerate(group):
                for name, changed in _renamed(schedule, op):
                    new = [*group[:place], changed, *group[place + 1 :]]
                    yield name, f"{what} as {changed}", edited([new])


def _renamed(schedule: Schedule, op: Op) -> Iterator[tuple[str, Op]]:
    """The same op for something else."""
    ends = {"stage": schedule.stages}
    if op.kind != Kind.REDUCE:
        ends |= {"micro_batch": schedule.micro_batches, "slice": schedule.slices}
    for name, end in ends.items():
        for number in range(end):
            if number != getattr(op, name):
                which = "R" if op.kind == Kind.R else "op"
                words = f"{which} of another {name.replace('_', '-')}"
                yield words, op._replace(**{name: number})
    if op.kind != Kind.REDUCE:
        for kind in Kind:
            if kind not in (op.kind, *STAGE_KINDS):
                yield "another kind", op._replace(kind=kind)


def trains_right(schedule: Schedule) -> bool:
    """Whether the executor's gradients are those of the reference, bit by bit."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh()).double()
        for _ in range(schedule.stages)
    ]
    twins = deepcopy(stages)
    x, y = torch.randn(
        2, 3 * schedule.micro_batches, 2 * schedule.slices, 4, dtype=torch.float64
    )
    torch.manual_seed(1)
    loss = Pipeline(stages, schedule, functional.mse_loss).step(x, y)
    torch.manual_seed(1)
    wanted = unpipelined(twins, schedule, functional.mse_loss, x, y)
    pairs = [
        (p.grad, q.grad)
        for one, other in zip(stages, twins)
        for p, q in zip(one.parameters(), other.parameters())
    ]
    return torch.equal(loss, wanted) and all(torch.equal(p, q) for p, q in pairs)


@dataclass
class OfSchedules:
    """What came of editing schedules.

    Attributes:
        tallies: by kind of edit, of what names each op once.
        no_schedules: of what names an R twice, and nothing else.
        trained, right: how many of the accepted were trained, and were right.
    """

    tallies: Tallies
    no_schedules: Tally
    trained: int = 0
    right: int = 0


def of_schedules(schedules: list[Schedule]) -> OfSchedules:
    """Edit, judge, and train what is accepted."""
    result = OfSchedules(defaultdict(Tally), Tally())
    for schedule in schedules:
        assert Interpreter(schedule, rows_of(schedule)).right(), schedule.summary
        seen = {schedule}
        for name, what, rows in edits_of_schedule(schedule):
            theirs = Interpreter(schedule, rows).right()
            try:
                mutant = schedule.with_rows([_joined(row) for row in rows])
                ours = check(mutant).ok
            except PipeproofError:
                ours = False
            twice = _twice(rows) == {Kind.R}
            tally = result.no_schedules if twice else result.tallies[name]
            tally.add(ours, theirs, f"{schedule.summary}: {name}: {what}")
            if ours and mutant not in seen:
                seen.add(mutant)
                result.trained += 1
                result.right += trains_right(mutant)
        print(schedule.summary, file=sys.stderr, flush=True)
    return result


def _twice(rows: Rows) -> set[Kind]:
    """Kinds of the ops that stand more than once."""
    ops = Counter(op for row in rows for group in row for op in group)
    return {op.kind for op, times in ops.items() if times > 1}


def _joined(row: list[list[Op]]) -> list[Any]:
    return [overlap(*group) if len(group) > 1 else group[0] for group in row]
