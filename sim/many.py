"""One program under many costs at once: jitter, what-if, search.

The replay with arrays for numbers: one pass over the instructions, each time a
vector with one entry per evaluation. numpy's additions and comparisons are those
of one evaluation, so each row equals `simulate` to the last bit; they cost next to
nothing beside the walk over the program, which all evaluations share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program, Schedule, Trace, lower
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import is_number
from pipeproof.sched.trace import Timetable
from pipeproof.sched.weights import Sizes
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost
from pipeproof.sim.replay import all_waits, not_in_order, refuse_contention, replay
from pipeproof.sim.timing import LONGEST, Timing
from pipeproof.sim.waits import turns

BLOCK = 2**22
"""Times kept at once, of all instructions together: 32 MiB."""

FEW = 32
"""With fewer evaluations at once, each is faster by itself."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What many evaluations of one program come to.

    In the durations' unit: int64 where all numbers were ints, float64 where any
    was a float, else objects.

    Attributes:
        makespan: shape (evaluations,).
        spans: (evaluations, devices), as `Trace.spans`.
        busy: (evaluations, devices), as `Trace.busy`.
    """

    makespan: NDArray[Any]
    spans: NDArray[Any]
    busy: NDArray[Any]


def simulate_many(
    schedule: Schedule | Program,
    durations: NDArray[Any],
    cost: Cost | None = None,
    cluster: Cluster | None = None,
) -> Batch:
    """Predict one program under many durations of its ops.

    A thousand steps with a tenth of jitter::

        program = lower(schedule)
        usual = np.array(cost.durations(program), dtype=float)
        noise = np.random.default_rng(0).normal(1, 0.1, (1000, len(usual)))
        batch = simulate_many(program, usual * noise.clip(0), cost, cluster)
        np.quantile(batch.makespan, [0.5, 0.99])

    Args:
        schedule: lowered with the default policies; a Program where others are
            wanted.
        durations: shape (evaluations, compute instructions), a row as from
            `Cost.durations`: finite numbers of at least 0. They are how long the
            ops take where they run: a cluster's `speeds` do not change them.
        cost: whose bytes cross the links; its times do not count.
        cluster: default free links.

    Returns:
        For each row what `simulate` would say, to the last bit.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: durations of another shape or out of range, or a cost that
            does not fit the schedule.
        UnsupportedError: ops that are not lowered yet, or what only the
            discrete-event engine can play.
    """
    cost, cluster = cost or Cost(), cluster or Cluster()
    program = schedule if isinstance(schedule, Program) else lower(schedule)
    durations = np.asarray(durations)
    _check(program, durations)
    refuse_contention(program, cluster)
    timing = Timing.of(program, _timeless(cost), cluster, cost.sizes(program))
    durations, fixed, latencies = _alike(
        durations,
        timing.unscaled(timing.durations),
        timing.unscaled(timing.latencies),
    )
    size = BLOCK // max(1, len(program))
    if size < FEW:
        blocks = _one_by_one(program, cluster, durations, fixed, latencies)
    else:
        steps = _Steps(program, cluster, fixed, latencies)
        blocks = [
            steps.run(durations[first : first + size])
            for first in range(0, len(durations), size)
        ]
    makespan, spans, busy = (np.concatenate(parts) for parts in zip(*blocks))
    return Batch(makespan, spans, busy)


def _timeless(cost: Cost) -> Cost:
    """Its bytes alone: its times must not decide the number type either."""
    times = dict.fromkeys(("forward", "input_grad", "weight_grad", "step"), 0)
    return replace(cost, **times, backward=None, recompute=None, overlap=None)


def _check(program: Program, durations: NDArray[Any]) -> None:
    computes = len(program.computes)
    if durations.ndim != 2 or durations.shape[1] != computes or not len(durations):
        raise ParameterError(
            f"durations must have a row for each evaluation and {computes} columns, "
            f"one for each compute instruction, got shape {durations.shape}"
        )
    numbers = durations.dtype.kind in "iuf" or (
        durations.dtype == object and all(map(is_number, durations.ravel().tolist()))
    )
    if not numbers:
        raise ParameterError(f"durations must be numbers, got {durations.dtype}")
    if not ((durations >= 0) & (durations < np.inf)).all():
        raise ParameterError("durations must be finite numbers of at least 0")


def _alike(*columns: NDArray[Any]) -> list[NDArray[Any]]:
    """In one number type: a float among them makes all floats, as in `simulate`."""
    floats = any(
        column.dtype.kind == "f"
        or (
            column.dtype == object
            and any(isinstance(number, float) for number in column.ravel().tolist())
        )
        for column in columns
    )
    if floats:
        return [column.astype(np.float64) for column in columns]
    durations, *others = columns
    longest = durations.astype(np.float64).sum(axis=1).max() + sum(
        float(column.astype(np.float64).sum()) for column in others
    )
    whole = longest < LONGEST and all(column.dtype != object for column in columns)
    # By way of lists: an object column must hold Python's ints, which do not wrap.
    return [
        column.astype(np.int64)
        if whole
        else np.array(column.tolist(), dtype=object).reshape(column.shape)
        for column in columns
    ]


def _one_by_one(
    program: Program,
    cluster: Cluster,
    durations: NDArray[Any],
    fixed: NDArray[Any],
    latencies: NDArray[Any],
) -> list[list[NDArray[Any]]]:
    result = []
    sizes = Sizes(np.zeros(len(program.buffers)))
    for row in durations:
        fixed[program.computes] = row
        start, end = replay(program, Timing.each(fixed, latencies, 1), cluster)
        trace = Trace(program, Timetable(start, end), "predicted", sizes)
        result.append(
            [
                np.array([number], dtype=fixed.dtype)
                for number in (trace.makespan, trace.spans, trace.busy)
            ]
        )
    return result


class _Steps:
    """A program as the steps that each block of evaluations walks through."""

    def __init__(
        self,
        program: Program,
        cluster: Cluster,
        fixed: NDArray[Any],
        latencies: NDArray[Any],
    ) -> None:
        self._program = program
        self._dtype = fixed.dtype
        self._fixed = fixed.tolist()
        self._send_of = np.full(len(program), -1)  # of each RECV
        self._send_of[program.recv_of] = program.send_of
        self._latency = np.zeros_like(fixed)
        self._latency[program.recv_of] = latencies
        self._before = _predecessors(program, cluster, self._send_of)

    def run(self, durations: NDArray[Any]) -> list[NDArray[Any]]:
        """Makespan, spans and busy time of some evaluations."""
        program, many = self._program, len(durations)
        own = iter(np.ascontiguousarray(durations.T))
        devices = program.schedule.devices
        busy, first, last = np.zeros((3, devices, many), self._dtype)
        makespan, idle = np.zeros((2, many), self._dtype)
        end = np.empty((len(program), many), self._dtype)
        started = [False] * devices
        steps = zip(
            program.action.tolist(),
            program.device.tolist(),
            self._before,
            self._send_of.tolist(),
            self._latency.tolist(),
            self._fixed,
            end,
        )
        for action, device, before, send, latency, takes, over in steps:
            ready = end[before[0]] if before else idle
            for other in before[1:]:
                ready = np.maximum(ready, end[other])
            if send >= 0:  # a RECV
                np.add(end[send], latency, out=over)
                np.maximum(over, ready, out=over)
            elif action == Action.COMPUTE:
                np.add(ready, next(own), out=over)
                busy[device] += over - ready
                if not started[device]:
                    first[device], started[device] = ready, True
                last[device] = over
            else:
                np.add(ready, takes, out=over)
            np.maximum(makespan, over, out=makespan)
        return [makespan, (last - first).T, busy.T]


def _predecessors(
    program: Program, cluster: Cluster, send_of: NDArray[Any]
) -> list[list[int]]:
    """What must end before each instruction, the one before on its stream first.

    Raises:
        UnsupportedError: one of them stands behind it in the list.
    """
    turn = turns(program, cluster)
    waits = all_waits(program, turn, cluster)
    late = np.flatnonzero(waits.values >= waits.owner)
    if len(late):
        raise not_in_order(program, int(waits.owner[late[0]]))
    late = np.flatnonzero(send_of >= np.arange(len(program)))
    if len(late):
        raise not_in_order(program, int(late[0]))
    last = [-1] * (int(turn.max(initial=-1)) + 1)
    result = []
    for index, (stream, needed) in enumerate(zip(turn.tolist(), waits.to_lists())):
        previous = last[stream]
        result.append([previous, *needed] if previous >= 0 else needed)
        last[stream] = index
    return result
