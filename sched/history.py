"""Operands that differ from an unpipelined step's, in words."""

from __future__ import annotations

from pipeproof.sched.deadlock import named
from pipeproof.sched.findings import Finding
from pipeproof.sched.ir import Kind
from pipeproof.sched.program import Program
from pipeproof.sched.walk import Difference, Operand, Past, Walk

SHOWN = 8
"""Moves of a tensor that a message spells out."""


def told(program: Program, walk: Walk, first: Difference) -> Finding:
    """The first operand that differs: what it holds, and how it came there."""
    names = walk.reference.names()
    device = int(program.device[first.instruction])
    last = program.schedule.stages - 1
    if first.buffer < 0:
        kinds = " or ".join(kind.name.lower() for kind in first.kinds)
        found = f"{first.op} finds no {kinds} among the buffers it reads"
    else:
        operand = Operand(first.buffer, first.found, first.past)
        found = f"{first.op} reads {held(program, walk, operand, names)}"
    if first.op.kind in (Kind.F, Kind.R) and first.op.stage == last:
        row = walk.reference.row(first.op.micro_batch, first.op.slice)
        found += "; its loss would count with targets and weight of "
        found += walk.reference.of_row(row)
    return Finding(
        "operand",
        device,
        _step(program, first.instruction),
        first.op,
        expected=names[first.expected],
        found=found,
        remedy=f"Look at instruction {first.instruction} and at what it reads; all "
        "before it is as in unpipelined training",
    )


def held(program: Program, walk: Walk, operand: Operand, names: dict[int, str]) -> str:
    """A buffer that was read, what it held, and how that came there.

    Args:
        program: whose.
        walk: in which it was read.
        operand: in a buffer that there is.
        names: of terms.
    """
    buffer = program.buffer_at(operand.buffer)
    words = f"{buffer}, which {_holds(program, walk, operand.term, names)}"
    # What lies there now says nothing about a read that did not find it.
    gone = ("freed", "overwritten", "unwritten")
    if walk.terms.keys[operand.term][0] in gone:
        return words
    return words + _history(program, operand.past)


def _holds(program: Program, walk: Walk, term: int, names: dict[int, str]) -> str:
    if term in names:
        return f"holds {names[term]}"
    match walk.terms.keys[term]:
        case ("unwritten", int(_)):
            return "nothing has written yet"
        case ("overwritten", int(_), int(other)):
            return f"{program.buffer_at(other)} has overwritten"
        case ("freed", int(_), int(by)):
            return f"{named(program, by)} has freed"
        case (("unwritten" | "overwritten" | "freed"), *_):
            raise AssertionError("a term that is matched above")
        case _:
            return "holds what unpipelined training never computes"


def _history(program: Program, past: Past | None) -> str:
    steps: list[str] = []
    while past is not None:
        index, past = past
        steps.append(named(program, index))
    if len(steps) > SHOWN:
        steps = [*steps[: SHOWN - 1], "…", steps[-1]]
    return f", from {' → '.join(reversed(steps))}" if steps else ""


def _step(program: Program, instruction: int) -> int | None:
    device, step = program.schedule.locate(int(program.first_op[instruction]))
    return step if device == int(program.device[instruction]) else None
