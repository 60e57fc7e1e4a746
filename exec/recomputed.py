"""What is said of the units that an R runs again → their places in each stage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from pipeproof.exec.errors import ModelError
from pipeproof.exec.stage import Stage
from pipeproof.exec.units import StageModule, parts_of, units_of
from pipeproof.sched import Kind, ParameterError, Schedule

Recomputed = Callable[[nn.Module], bool] | Sequence[Collection[int]]
"""Whether an R runs a module again; or for each stage, which of its layers."""


def recompute_only(
    homes: Mapping[tuple[int, int], Stage],
    stages: Sequence[StageModule | None],
    schedule: Schedule,
    recomputed: Recomputed,
    sharded: Collection[int] = (),
) -> None:
    """Choose the units of the stages here that an R runs again.

    Args:
        homes: the stages, by stage and device of the schedule.
        stages: as they were given.
        schedule: what they run.
        recomputed: a function of a module, which is asked for each sequence of units
            and, if it says no to one, for what that is a sequence of; or for each
            stage the places of what it is a sequence of.
        sharded: stages that torch shards.

    Raises:
        ParameterError: layers that are not there, or of a stage without an R.
        ModelError: a stage that torch shards.
    """
    has_r = set(schedule.ops.stage[schedule.ops.kind == Kind.R].tolist())
    if callable(recomputed):
        if not has_r:
            raise ParameterError(
                f"recomputed says what an R runs again, and {schedule.summary} has "
                "none: recompute(schedule, …) puts them in"
            )
    else:
        _check(recomputed, schedule, has_r)
    for (number, _), stage in homes.items():
        module = stages[number]
        assert module is not None
        if callable(recomputed):
            chosen = list(_asked(module, recomputed))
        else:
            chosen = list(_told(module, number, frozenset(recomputed[number])))
        if all(chosen) or number not in has_r:
            continue
        if number in sharded:
            raise ModelError(
                f"stage {number} is sharded by fully_shard, which gathers parameters "
                "for a whole stage: recompute all of it"
            )
        stage.recompute_only([place for place, yes in enumerate(chosen) if yes])


def _check(
    recomputed: Sequence[Collection[int]], schedule: Schedule, has_r: set[int]
) -> None:
    if len(recomputed) != schedule.stages:
        raise ParameterError(
            f"recomputed must have the layers of each of {schedule.stages} stages, got "
            f"{len(recomputed)}"
        )
    for number, places in enumerate(recomputed):
        if places and number not in has_r:
            raise ParameterError(
                f"recomputed has layers of stage {number}, of which "
                f"{schedule.summary} recomputes nothing: recompute(schedule, …) puts "
                "an R in"
            )


def _asked(module: StageModule, wanted: Callable[[nn.Module], bool]) -> Iterator[bool]:
    """Of each unit, whether it or a sequence that it is part of is wanted."""
    if isinstance(module, nn.Module) and wanted(module):
        yield from (True for _ in units_of(module))
        return
    parts = parts_of(module)
    if len(parts) == 1 and parts[0] is module:
        yield False
        return
    for part in parts:
        yield from _asked(part, wanted)


def _told(module: StageModule, number: int, places: frozenset[int]) -> Iterator[bool]:
    """Of each unit, whether its layer is among these."""
    parts = parts_of(module)
    if unknown := sorted(places - set(range(len(parts)))):
        raise ParameterError(
            f"recomputed has layer {unknown[0]} of stage {number}, which has "
            f"{len(parts)}, counted from 0"
        )
    for place, part in enumerate(parts):
        yield from (place in places for _ in units_of(part))
