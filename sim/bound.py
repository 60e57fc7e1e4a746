"""A makespan that no order of the same ops can beat."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeproof.sched.deps import OpTable, order
from pipeproof.sched.exact import Number, plain
from pipeproof.sched.program import Program
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.cost import Cost


def lower_bound(
    program: Program, cost: Cost | None = None, cluster: Cluster | None = None
) -> Number:
    """The larger of two bounds on the makespan of these ops on these devices.

    * Chain: the longest path of dependencies alone, link latencies included.
    * Work: a device cannot start before the shortest path to any of its ops, must
      run all of them, and after its last one at least the shortest path onward
      remains.

    Orders of the ops on their devices are free; placement and costs are given.
    Time and memory linear in the ops.

    On a shared processor the work is that of all devices.

    Args:
        program: whose ops to bound.
        cost: as in `simulate`.
        cluster: likewise; bandwidths count as unlimited.
    """
    cost, cluster = cost or Cost(), cluster or Cluster()
    schedule = program.schedule
    table = OpTable.of(schedule)
    graph = order(schedule, table)
    node = schedule.node_of_op
    before, after = (node[ends] for ends in table.dependencies)
    device = schedule.device_of_op[graph.first_op]
    time: list[Any] = [0] * len(graph.first_op)
    computes = program.computes
    nodes = node[program.first_op[computes]].tolist()
    for where, duration in zip(nodes, cost.durations(program)):
        time[where] = duration
    latency = {
        (a, b): cluster.link(a, b).latency if a != b else 0
        for a, b in set(zip(device[before].tolist(), device[after].tolist()))
    }
    # Longest paths to and from every op, in an order of rising levels.
    head: list[Any] = [0] * len(time)
    tail: list[Any] = [0] * len(time)
    edges = np.argsort(graph.level[before], kind="stable")
    ends = list(zip(before[edges].tolist(), after[edges].tolist()))
    place = device.tolist()
    for a, b in ends:
        reached = head[a] + time[a] + latency[place[a], place[b]]
        head[b] = max(head[b], reached)
    for a, b in sorted(ends, key=lambda edge: -int(graph.level[edge[1]])):
        left = tail[b] + time[b] + latency[place[a], place[b]]
        tail[a] = max(tail[a], left)
    chain = max((h + t + r for h, t, r in zip(head, time, tail)), default=0)
    work = [
        min(head[i] for i in mine)
        + sum(time[i] for i in mine)
        + min(tail[i] for i in mine)
        for d in range(schedule.devices)
        if (mine := np.flatnonzero(device == d).tolist())
    ]
    if cluster.shared_processor:
        work.append(sum(time))
    return plain(max([chain, *work]))
