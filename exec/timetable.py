"""One timetable of all ranks, out of what each saw.

What a rank notes of a transfer is when a thread of its own saw that it was over,
which may be late: the thread wants the interpreter, and other threads have it.
So the ends that were seen are upper bounds, and order says more than each of them:

    sender     ─send 0──────────┤seen         send 1 cannot have begun that late:
               ─send 1─┤seen                  on one stream it ends behind send 0,
    receiver        ├recv 0┤seen              and what was received had been sent
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import BufferKind, Program, Trace
from pipeproof.sched.causes import SHARED_PROCESSOR
from pipeproof.sched.groups import needs
from pipeproof.sched.instructions import StreamKind
from pipeproof.sched.trace import Timetable
from pipeproof.sched.weights import Sizes

Array = NDArray[np.float64]
Times = Sequence[tuple[int, float, float]]
"""Of some instructions: number, start and end in seconds."""
Ends = Callable[[], tuple[Array, Array]]
"""Start and end of each instruction, worked out when they are asked for."""


def to_text(times: Times) -> str:
    """To be sent."""
    return base64.b64encode(np.array(times, dtype="<f8").tobytes()).decode()


def from_text(text: str) -> Times:
    """As it was sent."""
    rows = np.frombuffer(base64.b64decode(text), dtype="<f8").reshape(-1, 3)
    return [(int(index), began, ended) for index, began, ended in rows.tolist()]


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


def measured(program: Program, start: Array, end: Array, *, shared: bool) -> Trace:
    """The trace of a step.

    Args:
        program: that ran.
        start: of each instruction, in seconds.
        end: likewise.
        shared: whether all devices of the schedule are one.
    """
    notes = (SHARED_PROCESSOR,) if shared else ()
    return Trace(program, Timetable(start, end), "measured", _shares(program), notes)


def _shares(program: Program) -> Sizes:
    """Activations in micro-batches of a device's share; bytes are not known."""
    share = np.array(program.schedule.placement.shares()[0])
    whole = program.buffers[:, 0] == BufferKind.ACTIVATION
    weight = np.where(whole, 1 / share[program.buffers[:, 2]], 0)
    return Sizes(weight)
