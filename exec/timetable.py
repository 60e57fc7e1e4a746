"""One timetable of all ranks, out of what each saw.

What a rank notes of a transfer is when a thread of its own saw that it was over,
which may be late: the thread wants the interpreter, and other threads have it.
So the ends that were seen are upper bounds, and order says more than each of them:

    sender     ─send 0──────────┤seen         send 1 cannot have begun that late:
               ─send 1─┤seen                  on one stream it ends behind send 0,
    receiver        ├recv 0┤seen              and what was received had been sent
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Program
from pipeproof.sched.groups import needs
from pipeproof.sched.instructions import StreamKind

Array = NDArray[np.float64]
Times = list[tuple[int, float, float]]
"""Of some instructions: number, start and end in seconds."""


def merged(program: Program, of_ranks: Sequence[Times]) -> tuple[Array, Array]:
    """Start and end of all instructions, from the first start on.

    An instruction begins when what it waits for has ended: a transfer is handed to
    its stream earlier, and an op that takes a message waits for it in its own time.

    Args:
        program: what the ranks ran.
        of_ranks: what each saw, by one clock.
    """
    start, end = np.zeros(len(program)), np.zeros(len(program))
    for times in of_ranks:
        for index, began, ended in times:
            start[index], end[index] = began, ended
    streams = program.by_stream
    transfers = {
        kind: [s for s, of in zip(streams, program.streams) if of.kind == kind]
        for kind in (StreamKind.RECV, StreamKind.SEND)
    }
    _in_order(end, transfers[StreamKind.RECV])
    sent, received = program.send_of, program.recv_of
    end[sent] = np.minimum(end[sent], end[received])
    _in_order(end, transfers[StreamKind.SEND])
    for stream in streams:
        for before, index in pairwise(stream.tolist()):
            start[index] = max(start[index], end[before])
            end[index] = max(end[index], start[index])
    waits = needs(program)
    np.maximum.at(start, waits.owner, end[waits.values])
    start = np.minimum(start, end)
    origin = start.min()
    return start - origin, end - origin


def _in_order(end: Array, streams: Sequence[NDArray[np.int64]]) -> None:
    """None ended later than one behind it on its stream was seen to end."""
    for stream in streams:
        end[stream] = np.minimum.accumulate(end[stream][::-1])[::-1]
