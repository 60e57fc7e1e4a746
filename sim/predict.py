"""Schedule or program, cost and cluster → predicted trace."""

from __future__ import annotations

from typing import Any, Literal, get_args

from numpy.typing import NDArray

from pipeproof.sched import Program, Schedule, Trace, lower
from pipeproof.sched.causes import SHARED_PROCESSOR
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.trace import Timetable
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost
from pipeproof.sim.engine import Progress, play
from pipeproof.sim.replay import replay
from pipeproof.sim.timing import Timing

Engine = Literal["auto", "events", "replay"]
"""Who plays a program."""


def simulate(
    schedule: Schedule | Program,
    cost: Cost | None = None,
    cluster: Cluster | None = None,
    *,
    engine: Engine = "auto",
    progress: Progress | None = None,
) -> Trace:
    """Predict when everything runs and what memory it takes.

    Args:
        schedule: lowered with the default policies; a Program where others are
            wanted.
        cost: default 1 for each of forward, input gradient and weight gradient.
        cluster: default free links.
        engine: `events`, the discrete-event engine; `replay`, one pass over the
            program, many times as fast and equal to the last bit, where transfers
            do not share links; `auto`, the replay where it applies.
        progress: called now and then with how many of how many events are over.

    Returns:
        A trace in the cost's unit of time: exact where all numbers were ints or
        Fractions, float64 where any was a float.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: costs that do not fit the schedule, or an unknown engine.
        UnsupportedError: ops that are not lowered yet, or a replay of what only
            the engine can play.
        DeadlockError: the cluster's buffering lets nothing go on.
    """
    if engine not in get_args(Engine):
        raise ParameterError(
            f"engine must be one of {', '.join(get_args(Engine))}, got {engine!r}"
        )
    cost, cluster = cost or Cost(), cluster or Cluster()
    program = schedule if isinstance(schedule, Program) else lower(schedule)
    sizes = cost.sizes(program)
    timing = Timing.of(program, cost, cluster, sizes)
    start, end = _times(program, timing, cluster, engine, progress)
    notes = (SHARED_PROCESSOR,) if cluster.shared_processor else ()
    return Trace(
        program,
        Timetable(start, end, timing.scale or 1),
        "predicted",
        sizes,
        notes,
    )


def _times(
    program: Program,
    timing: Timing,
    cluster: Cluster,
    engine: Engine,
    progress: Progress | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    if engine == "events":
        return play(program, timing, cluster, progress)
    try:
        if progress is not None:
            progress(0, timing.events)
        times = replay(program, timing, cluster)
        if progress is not None:
            progress(timing.events, timing.events)
    except UnsupportedError:
        if engine == "replay":
            raise
        return play(program, timing, cluster, progress)
    return times
