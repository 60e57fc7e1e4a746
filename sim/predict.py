"""Schedule or program, cost and cluster → predicted trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program, Schedule, Trace, lower
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, column, plain
from pipeproof.sched.memory import Sizes
from pipeproof.sim.cluster import Cluster, Link
from pipeproof.sim.cost import Cost
from pipeproof.sim.engine import Progress, play


def simulate(
    schedule: Schedule | Program,
    cost: Cost | None = None,
    cluster: Cluster | None = None,
    *,
    progress: Progress | None = None,
) -> Trace:
    """Predict when everything runs and what memory it takes.

    Args:
        schedule: lowered with the default policies; a Program where others are
            wanted.
        cost: default 1 for each of forward, input gradient and weight gradient.
        cluster: default free links.
        progress: called now and then with how many of how many events are over.

    Returns:
        A trace in the cost's unit of time: exact where all numbers were ints or
        Fractions, float64 where any was a float.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: costs that do not fit the schedule.
        UnsupportedError: ops that are not lowered yet.
        DeadlockError: the cluster's buffering lets nothing go on.
    """
    cost, cluster = cost or Cost(), cluster or Cluster()
    program = schedule if isinstance(schedule, Program) else lower(schedule)
    sizes = cost.sizes(program)
    durations = _durations(program, cost, cluster, sizes)
    latencies = [
        cluster.link_latency,
        *(link.latency for link in cluster.links.values()),
    ]
    scale = _whole([*durations, *latencies])
    if scale is None:
        floats = list(map(float, durations))
        start, end = play(program, floats, _with_latencies(cluster, float), progress)
        times = np.array(start, dtype=np.float64), np.array(end, dtype=np.float64)
    else:
        whole = [int(time * scale) for time in durations]
        start, end = play(
            program,
            whole,
            _with_latencies(cluster, lambda time: int(time * scale)),
            progress,
        )
        times = _exact(start, scale), _exact(end, scale)
    notes = ("all devices share one processor",) if cluster.shared_processor else ()
    return Trace(program, *times, "predicted", sizes, notes)


def _durations(
    program: Program, cost: Cost, cluster: Cluster, sizes: Sizes
) -> list[Number]:
    result: list[Number] = [0] * len(program)
    for index, time in zip(program.computes.tolist(), cost.durations(program)):
        result[index] = time
    moved = np.flatnonzero(np.isin(program.action, (Action.SEND, Action.COPY)))
    over_links = np.array([s.link is not None for s in program.streams])
    linked = over_links[program.stream[moved]]
    links = [
        cluster.link_bandwidth,
        *(link.bandwidth for link in cluster.links.values()),
    ]
    if any(bandwidth is not None for bandwidth in links):
        for index, size in _read(program, moved[linked], sizes, "link").items():
            result[index] = _link(program, cluster, index).occupied(size)
    if cluster.host_bandwidth is not None:
        host = Link(bandwidth=cluster.host_bandwidth)
        for index, size in _read(program, moved[~linked], sizes, "host").items():
            result[index] = host.occupied(size)
    copies = moved[linked & (program.action[moved] == Action.COPY)]
    for index in copies.tolist():  # a SEND's latency is its receiver's to wait for
        result[index] = plain(result[index] + _link(program, cluster, index).latency)
    return result


def _link(program: Program, cluster: Cluster, index: int) -> Link:
    ends = program.streams[program.stream[index]].link
    assert ends is not None
    return cluster.link(*ends)


def _read(
    program: Program, instructions: NDArray[np.int64], sizes: Sizes, what: str
) -> dict[int, Number]:
    """The bytes that each of these instructions reads."""
    if sizes.bytes is None:
        raise ParameterError(
            f"a {what} bandwidth needs bytes to send: give the Cost "
            f"{'boundary' if what == 'link' else 'activation'}_bytes"
        )
    mine = np.isin(program.reads.owner, instructions)
    result: dict[int, Number] = {}
    owners, read = program.reads.owner[mine], sizes.bytes[program.reads.values[mine]]
    for index, size in zip(owners.tolist(), read.tolist()):
        result[index] = result.get(index, 0) + size
    return result


def _whole(numbers: list[Any]) -> int | None:
    """What makes all of them whole when multiplied; None if any is a float.

    SimPy orders its events by time, and ints compare ten times as fast as
    Fractions.
    """
    if any(issubclass(kind, float) for kind in set(map(type, numbers))):
        return None
    return math.lcm(1, *(Fraction(number).denominator for number in set(numbers)))


def _with_latencies(cluster: Cluster, change: Callable[[Any], Number]) -> Cluster:
    links = {
        pair: replace(link, latency=change(link.latency))
        for pair, link in cluster.links.items()
    }
    return replace(cluster, link_latency=change(cluster.link_latency), links=links)


def _exact(times: list[Any], scale: int) -> NDArray[Any]:
    if scale == 1:
        return column(times)
    return np.array([Fraction(time, scale) for time in times], dtype=object)
