"""How long each compute instruction takes, from a table of times of ops.

Of millions of instructions few take different times; these are worked out once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Kind, Program, Schedule
from pipeproof.sched.exact import Number, plain
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import numbered, run
from pipeproof.sim.per_stage import Table, divide

LARGEST = 2**62
"""Codes stay below it."""

PAIRS = [Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]
"""The groups that have a joint time."""


def priced(
    program: Program, times: dict[Kind, Table], overlap: Table | None
) -> tuple[list[Number], NDArray[Any]]:
    """The durations that compute instructions have, and which of them each has.

    Args:
        program: whose.
        times: of each kind, (pipe, stage) → time.
        overlap: (pipe, stage of the F) → joint time of a group in `PAIRS`; None: the
            sum of its ops, as for every other group.
    """
    schedule, computes = program.schedule, program.computes
    ops, cell = schedule.ops, schedule.table.cell
    table = [number for kind in Kind for row in times[kind] for number in row]
    numbers, places = _same(table)
    cells = np.array([len(table) // len(Kind)], dtype=np.int32)
    of_op: list[NDArray[Any]] = [program.first_op, ops.kind, cell, cells]
    size = len(computes)
    largest = int(program.op_count.max(initial=0))
    if largest < 2:
        columns = [computes, *of_op, places, *new_columns((size, np.int32))]
        return numbers, run(_look_up, columns, results=[6], size=size)[0]
    # Groups whose ops take equally long do too; with an overlap, those of the same
    # kinds and stages.
    known = places if overlap is None else np.arange(len(places), dtype=np.int32)
    which = _alike(program, of_op, known, largest)
    example = np.empty(int(which.max()) + 1, dtype=np.int64)
    example[which[::-1]] = computes[::-1]  # the first of each
    different = []
    for instruction in example.tolist():
        first = int(program.first_op[instruction])
        members = slice(first, first + int(program.op_count[instruction]))
        at = places[ops.kind[members] * cells + cell[members]].tolist()
        parts = [numbers[place] for place in at]
        different.append(_joint(schedule, members, parts, overlap))
    return different, which


def _alike(
    program: Program, of_op: list[NDArray[Any]], known: NDArray[np.int32], largest: int
) -> NDArray[Any]:
    """A number for each compute instruction, the same where `known` says the same.

    Args:
        program: whose.
        of_op: columns that say where ops stand in `known`.
        known: for each kind, pipe and stage a number of at least 0.
        largest: the most ops of an instruction.
    """
    size, base = len(program.computes), int(known.max()) + 2
    digits = 1  # so many ops at once
    while digits < largest and size * base ** (digits + 1) < LARGEST:
        digits += 1
    alike = np.zeros(size, dtype=np.int64)
    for begin in range(0, largest, digits):
        part = np.array([begin, begin + digits, base])
        columns = [program.computes, program.op_count, *of_op, known, part, alike]
        (alike,) = run(_code, columns, results=[8], size=size)
        _, alike = numbered(alike)
    return alike


def _look_up(
    computes: Any,
    first_op: Any,
    kind: Any,
    cell: Any,
    cells: Any,
    places: Any,
    which: Any,
) -> None:
    for nth in range(len(computes)):
        op = first_op[computes[nth]]
        which[nth] = places[kind[op] * cells[0] + cell[op]]


def _code(
    computes: Any,
    op_count: Any,
    first_op: Any,
    kind: Any,
    cell: Any,
    cells: Any,
    known: Any,
    part: Any,
    code: Any,
) -> None:
    """The next ops of each instruction as further digits of its code."""
    base = part[2]
    for nth in range(len(computes)):
        first, count = first_op[computes[nth]], op_count[computes[nth]]
        result = code[nth]
        for op in range(first + part[0], first + part[1]):
            result *= base
            if op < first + count:
                result += 1 + known[kind[op] * cells[0] + cell[op]]
        code[nth] = result


def _joint(
    schedule: Schedule, members: slice, times: list[Number], overlap: Table | None
) -> Number:
    """How long an op or an overlap group takes, from its ops and their times."""
    if len(times) == 1:
        return times[0]
    ops = schedule.ops[members]
    if overlap is None or sorted(op.kind for op in ops) not in PAIRS:
        return plain(sum(times))
    forward = next(op for op in ops if op.kind == Kind.F)
    pipe = int(schedule.pipe_of[forward.micro_batch])
    return divide(overlap[pipe][forward.stage], schedule.slices)


def _same(numbers: list[Number]) -> tuple[list[Number], NDArray[np.int32]]:
    """The different objects among some numbers, and which of them each is.

    Most costs are one number for all stages; Fractions take long to compare.
    """
    names = list(map(id, numbers))
    by_name = dict(zip(names, numbers))
    place = dict(zip(by_name, range(len(by_name))))
    which = np.array([place[name] for name in names], dtype=np.int32)
    return list(by_name.values()), which
