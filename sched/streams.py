"""Which streams of a program are one: the models of communication libraries.

A communication library may give each ordered pair of devices a stream of its own,
or fewer, and what shares a stream runs in turn. The discrete-event simulation and
the search for deadlocks read it here.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.instructions import StreamKind
from pipeproof.sched.program import Program

StreamModel = Literal["dir", "pair", "one", "sync"]
"""`dir`: one per ordered pair, as lowered. `pair`: sends to and receives from one
device are one stream, as in a communicator of two made when it is first used.
`one`: all sends and receives of a device, as in one communicator of all.
`sync`: everything that a device does."""

STREAM_MODELS: tuple[StreamModel, ...] = get_args(StreamModel)

Buffering = int | Literal["eager", "rendezvous"]
"""What a send waits for: nothing; its receive to be posted; or, a number k, the
receive k messages before on its link to be done."""


def turn_of(
    program: Program, number: int, model: StreamModel, *, shared_processor: bool = False
) -> Hashable:
    """Equal for streams that are one.

    Args:
        program: whose streams.
        number: of one of them.
        model: of the communication library.
        shared_processor: whether the compute streams of all devices are one too.
    """
    stream = program.streams[number]
    if stream.kind == StreamKind.COMPUTE or model == "sync":
        return "compute", 0 if shared_processor else stream.device
    if stream.kind in (StreamKind.SEND, StreamKind.RECV):
        if model == "pair":
            return "pair", stream.device, stream.peer
        if model == "one":
            return "one", stream.device
    return number


def in_turn(
    program: Program, model: StreamModel, *, shared_processor: bool = False
) -> list[NDArray[np.int64]]:
    """The instructions of each stream, one after the other, in the program's order."""
    merged: dict[Hashable, list[NDArray[np.int64]]] = {}
    for number, members in enumerate(program.by_stream):
        key = turn_of(program, number, model, shared_processor=shared_processor)
        merged.setdefault(key, []).append(members)
    return [
        members[0] if len(members) == 1 else np.sort(np.concatenate(members))
        for members in merged.values()
    ]
