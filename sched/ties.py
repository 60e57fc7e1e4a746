"""Ties: stages that share parameters, as the embedding and the head of a GPT do.

A schedule says in `ties` which stages do, `ties: 0=3`. Each of them computes its own
part of the shared parameters' gradient; at the end of a step these are summed, and
every device that holds one of the stages gets the sum::

    device 0   stage 0   B0 + B1 + B2 ──┐
                                        ├──▶ sum ──▶ on both
    device 3   stage 3   B0 + B1 + B2 ──┘

On each device first those of its stages are added up, and then the devices' sums. What
one tie sums is all that exactly these stages share, however many parameters that is.
Where a stage has replicas, a REDUCE sums its gradient over these before, and the first
of its devices adds the sum::

    device 0   stage 0   B0 + B2 ──┐ REDUCE of stage 0 ──▶ on both ──┐ + of stage 1
    device 3   stage 0   B1 + B3 ──┘                                 └▶ on 0, 1, 2, 3

A STEP of a stage that shares waits for the sum, and so for other devices: it stands
behind all that its device computes, with nothing but STEPs behind it. `tying` lowers
it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.stage_words import StageWords

if TYPE_CHECKING:
    from pipeproof.sched.ir import Schedule

Tie = tuple[int, ...]
"""Stages that share parameters, ascending; at least two."""

MAX_TIES = 1 << 10
MAX_TIED = 1 << 16
"""Stages that all ties name together, at most."""

_WORDS = StageWords(
    "ties", "=", many=True, once="all that the same stages share is one tie"
)
named, format_ties = _WORDS.named, _WORDS.format


def listed(ties: Iterable[Any], where: str = "ties") -> tuple[Tie, ...]:
    """Ties in order, each with its stages in order, as a schedule keeps them.

    Raises:
        ParameterError: something else than groups of two or more different stages,
            one twice, or too many.
    """
    found: list[Tie] = []
    total = 0
    for given in ties:
        group = _WORDS.stages(given, where)
        total += len(group)
        if len(found) == MAX_TIES or total > MAX_TIED:
            raise ParameterError(
                f"{where}: at most {MAX_TIES:,} of {MAX_TIED:,} stages together, got "
                "more"
            )
        found.append(tuple(sorted(group)))
        if len(set(group)) < len(group):
            raise ParameterError(f"{where}: {named(found[-1])} names a stage twice")
    return _WORDS.each_once(found, where)


def parse_ties(text: str, where: str) -> tuple[Tie, ...]:
    """What `format_ties` wrote.

    Raises:
        ParseError: saying where, what was expected and found.
    """
    return _WORDS.parse(text, where, listed)


def wrong(schedule: Schedule) -> list[tuple[Tie, str, str]]:
    """Ties that the stages do not allow, with what was found and what to do."""
    return [
        (tie, f"there is no stage {tie[-1]}", "Name stages of the schedule, or drop it")
        for tie in schedule.ties
        if tie[-1] >= schedule.stages
    ]


def homes_of(schedule: Schedule, tie: Tie) -> dict[int, list[int]]:
    """By device, ascending, the stages of a tie whose gradients it adds.

    Each device that holds one of them is there, for it gets the sum. A stage is added
    by the first device that holds it; where each holds all of them, each adds them up
    by itself, and they need not meet.
    """
    held = held_by(schedule, tie)
    if meets_nobody(schedule, tie):
        return {device: list(tie) for device in held}
    left = set(tie)
    found: dict[int, list[int]] = {}
    for device, stages in held.items():
        found[device] = [stage for stage in stages if stage in left]
        left -= set(stages)
    return found


def held_by(schedule: Schedule, tie: Tie) -> dict[int, list[int]]:
    """By device, ascending, the stages of a tie that it holds, replicas included."""
    found: dict[int, set[int]] = {}
    for pipe in schedule.placement.pipes:
        for stage in tie:
            found.setdefault(pipe[stage], set()).add(stage)
    return {device: sorted(found[device]) for device in sorted(found)}


def meets_nobody(schedule: Schedule, tie: Tie) -> bool:
    """Whether each device that holds a stage of a tie holds all of them."""
    return all(len(held) == len(tie) for held in held_by(schedule, tie).values())


def ties_of_stage(schedule: Schedule, stage: int) -> list[int]:
    """The numbers of the ties that a stage is in."""
    return [number for number, tie in enumerate(schedule.ties) if stage in tie]


def tied_stages(schedule: Schedule) -> set[int]:
    """All that are in a tie."""
    return {stage for tie in schedule.ties for stage in tie}
