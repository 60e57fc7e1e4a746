"""Whether each STEP updates a stage's weights by its whole gradient, once.

All that a device computes with a stage's weights ends in its gradient. So a STEP that
reads the whole of it comes behind every use of the weights, and one that reads less
comes too early. The new weights are one term, `step(weights, gradient)`, on every
device that holds the stage if each makes one STEP, of the gradient that all have in
the end. Of what a stage shares, the gradient is the sum of its tie: it comes behind
every use of these weights anywhere, and is one term on all devices.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeproof.sched.findings import Finding
from pipeproof.sched.history import held
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Kind, Op
from pipeproof.sched.program import Program
from pipeproof.sched.tied import buffers_of
from pipeproof.sched.ties import named, ties_of_stage
from pipeproof.sched.walk import Update, Walk


def updates(program: Program, walk: Walk) -> Iterator[Finding]:
    """What is wrong with the STEPs of a program that was walked.

    Nothing where neither it nor its schedule has one.
    """
    schedule = program.schedule
    if not (walk.updated or schedule.has(Kind.STEP)):
        return
    final, sums = (
        {place: walk.gradient(n) for place, n in buffers_of(program, kind).items()}
        for kind in (BufferKind.GRADIENT, BufferKind.TIED)
    )
    for stage in range(schedule.stages):
        ties = ties_of_stage(schedule, stage)
        for device in sorted({pipe[stage] for pipe in schedule.placement.pipes}):
            place = stage, device
            shared = {tie: sums[tie, device] for tie in ties}
            yield from _judged(program, walk, place, final.get(place), shared)


def _judged(
    program: Program,
    walk: Walk,
    place: tuple[int, int],
    final: int | None,
    shared: dict[int, int],
) -> Iterator[Finding]:
    """The STEPs of a stage on a device.

    Args:
        program: whose.
        walk: of it.
        place: stage and device.
        final: the stage's gradient in the end.
        shared: the sums of its ties in the end, by their number.
    """
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
    for nth, update in enumerate(done):
        found = ""
        if nth:
            found = f"{op} updates the weights of stage {stage} a second time"
        elif update.gradient.term != final:
            lacking = _lacking(walk, update.gradient.term, final)
            found = f"{op} reads a gradient that is {lacking}"
        else:
            found = _unshared(program, walk, op, update, shared)
        if found:
            index = update.instruction
            yield Finding(
                "update",
                device,
                None,
                op,
                expected=f"one STEP of stage {stage}, of its whole gradient"
                + (", and that of what it shares" if shared else ""),
                found=found,
                remedy=f"Drop instruction {index}"
                if nth
                else f"Let instruction {index} wait for the last of the stage's "
                "gradient" + (", and for the sums of its ties" if shared else ""),
            )


def _unshared(
    program: Program, walk: Walk, op: Op, update: Update, shared: dict[int, int]
) -> str:
    """In what way it does not update by the sums of its stage's ties; or nothing."""
    for number, final in shared.items():
        operand = update.sums.get(number)
        if operand is None:
            tie = named(program.schedule.ties[number])
            return f"{op} does not read the sum of tie {tie}"
        if operand.term != final:
            return f"{op} reads {held(program, walk, operand, {})}"
    if more := sorted(update.sums.keys() - shared.keys()):
        tie = named(program.schedule.ties[more[0]])
        return f"{op} reads the sum of tie {tie}, which its stage is not in"
    return ""


def _lacking(walk: Walk, gradient: int, final: int | None) -> str:
    """In what way it is not the whole of it."""
    if final is None or walk.terms.keys[gradient][0] not in ("add", "nothing"):
        return "not the stage's"
    if walk.terms.keys[final][0] == "sum":
        return "not summed over the stage's devices yet"
    count = len(walk.terms.chain(final)) - len(walk.terms.chain(gradient))
    return f"not whole: it lacks what {count:,} backward{'s' if count != 1 else ''} add"
