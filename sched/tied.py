"""Whether what stages share ends as the sum over them, each once and all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from pipeproof.sched.certificate import Share
from pipeproof.sched.findings import Finding
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Schedule, Tie
from pipeproof.sched.program import Program
from pipeproof.sched.terms import NOTHING
from pipeproof.sched.ties import homes_of, named
from pipeproof.sched.walk import Walk

NO_STAGE = -(2**31)
"""In place of a stage: what is no stage's gradient."""


def tied(
    program: Program, walk: Walk
) -> tuple[tuple[tuple[Share, ...], ...], tuple[Finding, ...]]:
    """Each tie's reduction tree, and what is wrong with its sums.

    Args:
        program: in which each device of a tie has its sum once.
        walk: of all of it.
    """
    schedule = program.schedule
    gradients = buffers_of(program, BufferKind.GRADIENT)
    sums = buffers_of(program, BufferKind.TIED)
    stage_of = {walk.gradient(n): stage for (stage, _), n in gradients.items()}
    trees, findings = [], []
    for number, tie in enumerate(schedule.ties):
        homes = homes_of(schedule, tie)
        found = [walk.gradient(sums[number, device]) for device in homes]
        same = all(term == found[0] for term in found)
        match walk.terms.keys[found[0]]:
            case ("tie", int(which), *parts) if same and which == number:
                shares = [_stages(walk, part, stage_of) for part in parts]
            case _:
                findings.append(_no_sum(tie, homes))
                continue
        findings += _unequal(schedule, tie, shares)
        trees.append(tuple(Share(*of) for of in zip(homes, shares) if of[1]))
    return tuple(trees), tuple(findings)


def buffers_of(program: Program, kind: BufferKind) -> dict[tuple[int, int], int]:
    """Gradients by stage and device, or sums by tie and device."""
    numbers = np.flatnonzero(program.buffers[:, 0] == kind)
    rows = zip(program.buffers[numbers, 1:3].tolist(), numbers.tolist())
    return {(of, device): number for (device, of), number in rows}


def _stages(walk: Walk, part: object, stage_of: dict[int, int]) -> tuple[int, ...]:
    """The stages whose gradients a device added up, in order.

    One that was not done yet is -1 - stage; what is no stage's gradient has the
    number of none, and what nothing was added to yet is none.
    """
    assert isinstance(part, int)
    _, *terms = walk.terms.keys[part]
    return tuple(
        stage_of.get(term, _early(walk, term))
        for term in terms
        if isinstance(term, int) and term != NOTHING
    )


def _early(walk: Walk, term: int) -> int:
    match walk.terms.keys[walk.terms.chain(term)[0]]:
        case ("grad", int(stage), *_):
            return -1 - stage
        case _:
            return NO_STAGE


def _unequal(
    schedule: Schedule, tie: Tie, shares: list[tuple[int, ...]]
) -> Iterator[Finding]:
    """What a tie's sum lacks, has twice, or should not have."""
    times = Counter(stage for share in shares for stage in share)
    early = [-1 - stage for stage in times if NO_STAGE < stage < 0]
    faults = [
        *(f"lacks that of stage {s}" for s in tie if not times[s] and s not in early),
        *(f"has that of stage {s} before it is done" for s in early),
        *(f"has that of stage {s} twice or more" for s in tie if times[s] > 1),
        *(f"has that of stage {s}" for s in times if s >= 0 and s not in tie),
    ]
    if times[NO_STAGE]:
        faults.append("has what is no stage's gradient")
    if faults:
        yield Finding(
            "tie",
            next(iter(homes_of(schedule, tie))),
            None,
            None,
            expected=f"the gradient of stages {', '.join(map(str, tie))}, each once "
            "and whole",
            found=f"the sum of tie {named(tie)} {', '.join(faults)}",
            remedy="Let each device's TIE read the gradients of its own stages, behind "
            "their last B, W or REDUCE",
        )


def _no_sum(tie: Tie, homes: dict[int, list[int]]) -> Finding:
    where = ", ".join(map(str, homes))
    return Finding(
        "tie",
        next(iter(homes)),
        None,
        None,
        expected=f"one sum on devices {where}, and nothing written over it",
        found=f"what lies there in the end is not what tie {named(tie)} summed",
        remedy="Let only its TIE write the tied buffer of each device",
    )
