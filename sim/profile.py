"""Traces of the same stages in several schedules → one Cost, and the links' times.

An op is given all the time from when it could have started: from the end of the op
before it on its device, or of what it waited for, if that was later. So what the
device does beside ops, to hand messages over and to note times, counts as theirs,
and what is simulated with these costs takes as long as what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Trace
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number
from pipeproof.sched.instructions import StreamKind
from pipeproof.sched.trace import Timetable
from pipeproof.sim.cluster import Link
from pipeproof.sim.cost import Cost
from pipeproof.sim.fit import FIELDS, fit

Links = dict[tuple[int, int], Link]


def cost_of(traces: Sequence[Trace]) -> Cost:
    """The times per stage that explain measured traces, of all kinds in any of them.

    Args:
        traces: of schedules with the same stages on the same devices. Of each kind
            the median over those that have it counts.

    Raises:
        ParameterError: no traces, of other stages, or as `fit`.
    """
    if not traces:
        raise ParameterError("a cost is made of at least one trace, got none")
    placements = {trace.program.schedule.placement for trace in traces}
    if len(placements) > 1:
        raise ParameterError(
            f"traces of {len(placements)} placements do not have the same stages on "
            "the same devices"
        )
    found: dict[str, list[Any]] = {}
    for trace in traces:
        cost = fit(occupied(trace), _mean).cost
        for kind, name in FIELDS.items():
            if trace.program.schedule.has(kind):
                found.setdefault(name, []).append(getattr(cost, name))
    times = {name: np.median(rows, axis=0).tolist() for name, rows in found.items()}
    if "input_grad" not in times:
        halves = [number / 2 for number in times["backward"]]
        times |= {"input_grad": halves, "weight_grad": halves}
    return Cost(**times)


def _mean(times: NDArray[Any]) -> Number:
    return float(times.mean())


def occupied(trace: Trace) -> Trace:
    """The trace, each op from when it could have started."""
    program = trace.program
    ready = np.zeros(len(program))
    waits = program.waits_for
    np.maximum.at(ready, waits.owner, trace.end[waits.values])
    start = trace.start.copy()
    for stream, members in zip(program.streams, program.by_stream):
        if stream.kind != StreamKind.COMPUTE:
            continue
        for before, index in pairwise(members.tolist()):
            start[index] = max(trace.end[before], ready[index])
    return replace(trace, timetable=Timetable(np.minimum(start, trace.end), trace.end))


def links_of(
    traces: Sequence[Trace],
    rates: Mapping[tuple[int, int], float] | None = None,
    cost: Cost | None = None,
) -> Links:
    """Of each link, the median time from handing a message over to having it.

    Of messages whose receive was posted in time; in a step where there are none, from
    when it was posted. Where the link's rate is known, what its messages' bytes take of
    that is left to its bandwidth, and the rest is latency; elsewhere all of it is, for
    the messages of a link have one size.

    Args:
        traces: as for `cost_of`.
        rates: of links, bytes per unit of the traces' time.
        cost: that knows bytes, if there are rates.
    """
    rates = rates or {}
    found: dict[tuple[int, int], list[NDArray[Any]]] = {}
    for trace in traces:
        send, recv = trace.program.send_of, trace.program.recv_of
        took = trace.end[recv] - np.maximum(trace.start[send], trace.start[recv])
        if rates and cost is not None:
            took -= _in_transit(trace, rates, cost)
        in_time = trace.start[recv] <= trace.start[send]
        ends = trace.program.messages[:, 6:8]
        for source, target in np.unique(ends, axis=0).tolist():
            mine = (ends == (source, target)).all(axis=1)
            if (mine & in_time).any():
                mine &= in_time
            found.setdefault((source, target), []).append(took[mine])
    medians = {
        link: max(0.0, float(np.median(np.concatenate(several))))
        for link, several in found.items()
    }
    return {
        link: Link(latency=latency, bandwidth=rates.get(link))
        for link, latency in medians.items()
    }


def _in_transit(
    trace: Trace, rates: Mapping[tuple[int, int], float], cost: Cost
) -> NDArray[Any]:
    """Of each message, the time that its bytes take at its link's rate."""
    program, size = trace.program, cost.sizes(trace.program).bytes
    assert size is not None
    reads, read = program.reads, np.zeros(len(program))
    np.add.at(read, reads.owner, size[reads.values].astype(float))
    ends = map(tuple, program.messages[:, 6:8].tolist())
    return read[program.send_of] / [rates.get(link, np.inf) for link in ends]
