"""Whether each STEP updates a stage's weights by its whole gradient, once.

All that a device computes with a stage's weights ends in its gradient. So a STEP that
reads the whole of it comes behind every use of the weights, and one that reads less
comes too early. The new weights are one term, `step(weights, gradient)`, on every
device that holds the stage if each makes one STEP, of the gradient that all have in
the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeproof.sched.findings import Finding
from pipeproof.sched.ir import Kind, Op
from pipeproof.sched.program import BufferKind, Program
from pipeproof.sched.walk import Walk


def updates(program: Program, walk: Walk) -> Iterator[Finding]:
    """What is wrong with the STEPs of a program that was walked.

    Nothing where neither it nor its schedule has one.
    """
    schedule, rows = program.schedule, program.buffers
    if not (walk.updated or schedule.has(Kind.STEP)):
        return
    final = {
        (int(rows[number, 2]), int(rows[number, 1])): walk.gradient(number)
        for number in np.flatnonzero(rows[:, 0] == BufferKind.GRADIENT).tolist()
    }
    for stage in range(schedule.stages):
        for device in sorted({pipe[stage] for pipe in schedule.placement.pipes}):
            place = stage, device
            yield from _judged(program, walk, place, final.get(place))


def _judged(
    program: Program, walk: Walk, place: tuple[int, int], final: int | None
) -> Iterator[Finding]:
    stage, device = place
    done = walk.updated.get(place, [])
    op = Op(Kind.STEP, stage)
    if not done:
        yield Finding(
            "update",
            device,
            None,
            op,
            expected="one STEP of each stage on each device that holds it",
            found=f"device {device} makes none of stage {stage}: its weights stay as "
            "they were",
            remedy=f"Add {op} behind the last of the stage's gradient",
        )
    for nth, (index, gradient) in enumerate(done):
        found = ""
        if nth:
            found = f"{op} updates the weights of stage {stage} a second time"
        elif gradient != final:
            found = f"{op} reads a gradient that is {_lacking(walk, gradient, final)}"
        if found:
            yield Finding(
                "update",
                device,
                None,
                op,
                expected=f"one STEP of stage {stage}, of its whole gradient",
                found=found,
                remedy=f"Drop instruction {index}"
                if nth
                else f"Let instruction {index} wait for the last of the stage's "
                "gradient",
            )


def _lacking(walk: Walk, gradient: int, final: int | None) -> str:
    """In what way it is not the whole of it."""
    if final is None or walk.terms.keys[gradient][0] not in ("add", "nothing"):
        return "not the stage's"
    if walk.terms.keys[final][0] == "sum":
        return "not summed over the stage's devices yet"
    count = len(walk.terms.chain(final)) - len(walk.terms.chain(gradient))
    return f"not whole: it lacks what {count:,} backward{'s' if count != 1 else ''} add"
