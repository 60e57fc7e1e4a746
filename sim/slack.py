"""How much later each instruction could end without a longer step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Trace, kernels
from pipeproof.sched.exact import column
from pipeproof.sched.parts import scale_of, scaled, unscaled
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.replay import all_waits, not_in_order
from pipeproof.sim.waits import turns


def slack(trace: Trace, cluster: Cluster | None = None) -> NDArray[Any]:
    """How much later each instruction could end without a longer step.

    If it alone were late, and the order of everything stayed. On the critical path
    there is none; of floats, up to rounding. Transfers that share links keep the
    time they took.

    Args:
        trace: a predicted one.
        cluster: that it was predicted for.

    Returns:
        Per instruction, in the trace's unit of time.

    Raises:
        UnsupportedError: a program, made by hand, in which an instruction stands
            before one that it waits for.
    """
    cluster = cluster or Cluster()
    program = trace.program
    turn = turns(program, cluster)
    waits = all_waits(program, turn, cluster)
    backward = np.flatnonzero(waits.values >= waits.owner)
    if len(backward):
        raise not_in_order(program, int(waits.owner[backward[0]]))
    if not len(program):
        return trace.end.copy()
    times = trace.start, trace.end, _latencies(trace, cluster)
    scale = scale_of(*times)
    start, end, under_way = (scaled(some, scale) for some in times)
    dtype = np.result_type(start, end, under_way)
    send_of = np.full(len(program), -1)
    send_of[program.recv_of] = program.send_of
    duration = (end - start).astype(dtype)
    # From the end of its SEND on, a RECV takes the link's latency, and nothing from
    # its own start on.
    duration[program.recv_of] = under_way
    latest = np.full(len(program), max(end.tolist()), dtype=dtype)
    after = np.full(int(turn.max(initial=-1)) + 1, -1)
    columns = [turn, send_of, waits.offsets, waits.values, duration, after, latest]
    size = len(program) + len(waits.values)
    (found,) = kernels.run(_latest, columns, results=[6], size=size)
    return unscaled(found - end, scale)


def _latencies(trace: Trace, cluster: Cluster) -> NDArray[Any]:
    """Of each message."""
    devices = trace.program.schedule.devices
    pair = trace.program.messages[:, 6].astype(np.int64) * devices
    pair += trace.program.messages[:, 7]
    pairs, which = np.unique(pair, return_inverse=True)
    links = (cluster.link(*divmod(number, devices)) for number in pairs.tolist())
    latency = column([link.latency for link in links])
    if trace.end.dtype == np.float64:
        latency = latency.astype(np.float64)
    return latency[which]


def _latest(
    turn: Any,
    send_of: Any,
    offsets: Any,
    waits: Any,
    duration: Any,
    after: Any,
    latest: Any,
) -> None:
    for i in range(len(turn) - 1, -1, -1):
        # When it must start at the latest. A later one on its stream, if any, has
        # already said so of this one's end.
        behind = after[turn[i]]
        if behind >= 0:
            start = latest[behind]
            if send_of[behind] < 0:
                start -= duration[behind]
            if start < latest[i]:
                latest[i] = start
        after[turn[i]] = i
        start = latest[i]
        if send_of[i] >= 0:
            left = start - duration[i]
            if left < latest[send_of[i]]:
                latest[send_of[i]] = left
        else:
            start -= duration[i]
        for place in range(offsets[i], offsets[i + 1]):
            if start < latest[waits[place]]:
                latest[waits[place]] = start
