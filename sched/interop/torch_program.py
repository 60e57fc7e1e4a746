"""The program that a CSV of torch's with communication says, pairing and all.

`lower` chooses where sends and receives lie; this takes them from the file, so that
what torch's own lowering does can be judged. torch's runtime goes through a row in
order: it waits until an op's tensor has arrived, runs it, and posts sends and
receives without waiting for them. So each of these waits for the ops ahead of it in
its row, and an op for its own RECV. Links carry no labels: the k-th SEND from one
rank to another fills what the k-th RECV there was posted for, whatever their names.
Each tensor has a buffer of its own, as in torch.

torch scales gradients and not losses: REDUCE_GRAD divides a stage's by the number of
micro-batches. A file in which one is missing where other stages have one, comes twice,
or does not stand behind all of its stage's backwards never comes here, so that each
micro-batch's term has its weight once, as in the terms of `prove`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.instructions import Action, MessageKind
from pipeproof.sched.interop.torch_comms import transfer
from pipeproof.sched.interop.torch_csv import TorchCsv
from pipeproof.sched.lists import Lists
from pipeproof.sched.lower import lower
from pipeproof.sched.program import Program, Stored


def torch_program(csv: TorchCsv) -> Program:
    """What a file's ranks do, with its own order of sends and receives.

    Nothing is asked of that order: `prove`, or `check` under a stream model, says
    what is wrong with it. The instructions stand in an order in which each comes
    after all it waits for, as far as there is one.

    Args:
        csv: with communication; `read_torch_csv(text, agreeing=False)` reads one
            whose transfers need not pair up.

    Raises:
        ScheduleError: its ops break a rule of `check`.
        ParseError: a transfer between stages that have none, or of a micro-batch that
            no op has.
        ParameterError: a file without communication, which `lower` adds.
    """
    if not csv.has_communication:
        raise ParameterError(
            "torch_program takes a CSV with communication; lower the schedule of one "
            "without"
        )
    base = lower(csv.schedule, receives="late")
    rows = list(_rows(csv, base))
    return _assembled(base, _merged(base, rows))


@dataclass(frozen=True, slots=True)
class _Step:
    """An instruction of the base program, and what it waits for: others of it."""

    index: int
    waits: tuple[int, ...]


def _rows(csv: TorchCsv, base: Program) -> Iterator[list[_Step]]:
    """Each rank's instructions in the file's order."""
    home, highest = csv.schedule.placement.pipes[0], csv.schedule.micro_batches - 1
    number = {
        (kind, source, micro_batch): index
        for index, (kind, source, _, _, micro_batch, *_) in enumerate(
            base.messages.tolist()
        )
    }
    computes: dict[int, deque[int]] = defaultdict(deque)
    local = np.flatnonzero(np.isin(base.action, (Action.COMPUTE, Action.LOCAL)))
    for index in local.tolist():
        computes[int(base.device[index])].append(index)
    for rank, cells in enumerate(csv.cells()):
        row: list[_Step] = []
        last: tuple[int, ...] = ()  # what was computed, or handed over, ahead
        for cell in cells:
            if cell.ops:
                for index in _next(base, computes[rank]):
                    last = (index,)
                    waits = base.waits_for[index]
                    row.append(_Step(index, tuple(waits)))
            elif cell.micro_batch >= 0:
                way, source, micro_batch = transfer(cell, home)
                if micro_batch > highest:
                    raise cell.place.wrong(
                        f"a transfer of micro-batch 0 … {highest}", cell.word
                    )
                kind = MessageKind.ACTIVATION if way == "F" else MessageKind.GRADIENT
                sends = cell.action.startswith("SEND")
                ends = base.send_of if sends else base.recv_of
                index = int(ends[number[kind, source, micro_batch]])
                row.append(_Step(index, last))
        yield row


def _next(base: Program, left: deque[int]) -> Iterator[int]:
    """A rank's next op, and what it hands over to stages of the same rank."""
    yield left.popleft()
    while left and base.action[left[0]] == Action.LOCAL:
        yield left.popleft()


def _merged(base: Program, rows: list[list[_Step]]) -> list[_Step]:
    """All rows as one list, in which each stands behind what it waits for.

    A RECV stands behind the SEND that it pairs up with. What waits in a ring comes
    last, row by row.
    """
    merged: list[_Step] = []
    done: set[int] = set()
    sent: dict[tuple[int, int], int] = defaultdict(int)
    received: dict[tuple[int, int], int] = defaultdict(int)
    at = [0] * len(rows)

    def ready(step: _Step) -> bool:
        if not done.issuperset(step.waits):
            return False
        if base.action[step.index] != Action.RECV:
            return True
        link = _link(base, step)
        return received[link] < sent[link]

    moving = True
    while moving:
        moving = False
        for device, row in enumerate(rows):
            while at[device] < len(row) and ready(row[at[device]]):
                step = row[at[device]]
                at[device] += 1
                done.add(step.index)
                if base.action[step.index] == Action.SEND:
                    sent[_link(base, step)] += 1
                elif base.action[step.index] == Action.RECV:
                    received[_link(base, step)] += 1
                merged.append(step)
                moving = True
    return merged + [step for row, begin in zip(rows, at) for step in row[begin:]]


def _link(base: Program, step: _Step) -> tuple[int, int]:
    source, target = base.messages[base.message[step.index], 6:8].tolist()
    return source, target


def _in_order(base: Program, order: NDArray[np.int64]) -> tuple[Lists, Lists, Lists]:
    """What each of these instructions reads, writes and frees."""
    reads, writes, frees = (
        Lists.of([touched[i] for i in order.tolist()])
        for touched in (base.reads, base.writes, base.frees)
    )
    return reads, writes, frees


def _assembled(base: Program, steps: Sequence[_Step]) -> Program:
    """These instructions in this order; a message's missing side is -1."""
    order = np.array([step.index for step in steps], dtype=np.int64)
    place = {step.index: number for number, step in enumerate(steps)}
    messages = base.messages.copy()
    for column in (8, 9):
        ends = messages[:, column].tolist()
        messages[:, column] = [place.get(index, -1) for index in ends]
    waits = [[place[w] for w in step.waits if w in place] for step in steps]
    return replace(
        base,
        stream=base.stream[order],
        action=base.action[order],
        first_op=base.first_op[order],
        op_count=base.op_count[order],
        message=base.message[order],
        waits_for=Lists.of(waits),
        storage=Stored(
            messages,
            base.buffers,
            *_in_order(base, order),
        ),
    )
