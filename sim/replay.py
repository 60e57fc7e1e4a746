"""The replay of a program: every time in one pass over its instructions.

`lower` keeps instructions in an order in which each comes after all it can ever
wait for. So where the time that an instruction takes is known before it starts, no
queue of events is needed: in that order,

    start = max(ends of all it waits for)
    end   = start + duration, or of a RECV max(start, end of its SEND + latency)

which are the additions and comparisons of the discrete-event engine, and so its
times to the last bit. What it waits for is

* the instruction before it on its stream, its `waits_for`, and what its group adds;
* of a REDUCE or TIE, what the other devices' of this stage or tie wait for;
* of a SEND with k buffers, the end of the receive k messages before;
* of a SEND under rendezvous, what its receive waits for before it is posted. In
  `lower`'s order a SEND stands next to its RECV, so all that is earlier too.

Streams that are one, on a shared processor or by the cluster's stream model, take
turns in the program's order.

Not played, but left to the engine: transfers that share a link, whose durations
depend on each other, and programs (made by hand) in which some instruction stands
before one it waits for. The latter are found by the pass itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program, kernels
from pipeproof.sched.errors import UnsupportedError
from pipeproof.sched.groups import Edges
from pipeproof.sched.lists import Lists
from pipeproof.sim.cluster import Cluster
from pipeproof.sim.timing import Timing
from pipeproof.sim.topology import contended
from pipeproof.sim.waits import (
    admitted_by_start,
    in_program,
    not_in_program,
    turns,
)

_SEND, _RECV = int(Action.SEND), int(Action.RECV)


def replay(
    program: Program, timing: Timing, cluster: Cluster
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Start and end of each instruction, in the timing's unit and number type.

    Args:
        program: what to play.
        timing: durations and latencies.
        cluster: buffering, stream model, and whether devices share a processor.

    Raises:
        UnsupportedError: only the discrete-event engine can play it.
    """
    refuse_contention(program, cluster)
    turn = turns(program, cluster)
    waits = all_waits(program, turn, cluster)
    dtype = timing.times.dtype
    start, end = kernels.columns(*[(len(program), dtype)] * 2)
    columns: list[NDArray[Any]] = [
        turn,
        program.action,
        program.message,
        waits.offsets,
        waits.values,
        timing.times,
        timing.which,
        timing.latencies,
        np.zeros(len(program.streams) + len(program.groups.values), dtype=dtype),
        np.full(len(timing.latencies), -1, dtype=dtype),
        start,
        end,
        np.full(1, -1),
    ]
    start, end, stuck = kernels.run(
        _pass, columns, results=[10, 11, 12], size=len(program) + len(waits.values)
    )
    if stuck[0] >= 0:
        raise not_in_order(program, int(stuck[0]))
    return start, end


def _pass(
    turn: Any,
    action: Any,
    message: Any,
    offsets: Any,
    waits: Any,
    times: Any,
    which: Any,
    latencies: Any,
    free: Any,
    arrival: Any,
    start: Any,
    end: Any,
    stuck: Any,
) -> None:
    for i in range(len(turn)):
        stream = turn[i]
        ready = free[stream]
        for place in range(offsets[i], offsets[i + 1]):
            before = waits[place]
            if before >= i:
                stuck[0] = i
                return
            if end[before] > ready:
                ready = end[before]
        start[i] = ready
        if action[i] == _RECV:
            over = arrival[message[i]]
            if over < 0:  # it is not sent yet
                stuck[0] = i
                return
            if ready > over:
                over = ready
        else:
            over = ready + times[which[i]]
            if action[i] == _SEND:
                arrival[message[i]] = over + latencies[message[i]]
        end[i] = over
        free[stream] = over


def refuse_contention(program: Program, cluster: Cluster) -> None:
    """Raise where transfers share a link.

    Raises:
        UnsupportedError: how long each takes then depends on the others.
    """
    if contended(program, cluster):
        raise UnsupportedError(
            f"{program.schedule.summary}: transfers share a network card or a node's "
            "way to its host, so how long each takes depends on the others: only "
            "simulate(..., engine='events') can play them"
        )


def not_in_order(program: Program, index: int) -> UnsupportedError:
    """What to raise where an instruction waits for one behind it in the list."""
    return UnsupportedError(
        f"{program.schedule.summary}: instruction {index}, {program.label(index)} "
        f"(device {program.device[index]}), stands before one that it waits for: only "
        "simulate(..., engine='events') can play it"
    )


def all_waits(program: Program, turn: NDArray[Any], cluster: Cluster) -> Lists:
    """All that each instruction waits for, beside its stream and its message."""
    waits = in_program(program, cluster)
    before, after = not_in_program(program, cluster)
    recvs, sends = admitted_by_start(program, cluster)
    if len(sends):
        further = _posted(program, waits, turn, recvs, sends)
        before = np.concatenate([before, further[0]])
        after = np.concatenate([after, further[1]])
    if not len(before):
        return waits
    order = np.argsort(after, kind="stable")
    total = len(waits.values) + len(before)
    columns: list[NDArray[Any]] = [
        waits.offsets,
        waits.values,
        before[order],
        after[order],
        *kernels.columns((len(program) + 1, waits.offsets.dtype), (total, np.int32)),
    ]
    return Lists(*kernels.run(_joined, columns, results=[4, 5], size=total))


def _joined(
    offsets: Any, values: Any, before: Any, after: Any, joined_at: Any, joined: Any
) -> None:
    """What else an instruction waits for comes behind its own list."""
    begin, row = 0, 0
    for more in range(len(after)):
        end = offsets[after[more] + 1]
        joined[begin + more : end + more] = values[begin:end]
        joined[end + more] = before[more]
        begin = end
        while row <= after[more]:
            joined_at[row] = offsets[row] + more
            row += 1
    joined[begin + len(after) :] = values[begin:]
    while row < len(offsets):
        joined_at[row] = offsets[row] + len(after)
        row += 1


def _posted(
    program: Program,
    waits: Lists,
    turn: NDArray[Any],
    recvs: NDArray[np.int64],
    sends: NDArray[np.int64],
) -> Edges:
    """What must end before a SEND may start, because its RECV waits for it."""
    order = np.argsort(turn, kind="stable")
    follows = np.flatnonzero(turn[order[1:]] == turn[order[:-1]])
    previous = np.full(len(program), -1, dtype=np.int64)
    previous[order[follows + 1]] = order[follows]
    send_of = np.full(len(program), -1, dtype=np.int64)
    send_of[recvs] = sends
    behind = previous[recvs] >= 0
    owner = send_of[waits.owner]
    return (
        np.concatenate([previous[recvs[behind]], waits.values[owner >= 0]]),
        np.concatenate([sends[behind], owner[owner >= 0]]),
    )
