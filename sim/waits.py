"""What instructions wait for by the cluster, beyond what their program says.

Both ways of playing a program read it here: the discrete-event engine and the
replay.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, Program
from pipeproof.sched.groups import Edges, needs, turns_of_others
from pipeproof.sched.instructions import StreamKind
from pipeproof.sched.lists import Lists
from pipeproof.sched.matching import meeting
from pipeproof.sched.streams import turn_of
from pipeproof.sim.cluster import Cluster


def turns(program: Program, cluster: Cluster) -> NDArray[np.int32]:
    """For each instruction a number: equal for those that take turns.

    That of the first stream that is one with its own, on a shared processor or by the
    cluster's stream model; of those posted in a group, which take none, one for each
    behind these. Turns are in the program's order, in which every instruction stands
    behind all that it waits for: merging streams delays a program that `lower` wrote,
    and never deadlocks it, but where sender and receiver are one stream (`sync` on a
    shared processor) under rendezvous, or both exchange messages in groups.
    """
    result = _turns(program, cluster)
    posted = program.groups.values
    if len(posted):
        result = result.copy()
        result[posted] = len(program.streams) + np.arange(len(posted))
    return result


def _turns(program: Program, cluster: Cluster) -> NDArray[np.int32]:
    """The same, but for groups."""
    first: dict[Hashable, int] = {}
    model, shared = cluster.streams, cluster.shared_processor
    if model == "dir" and not shared:
        homes = [s.device for s in program.streams if s.kind == StreamKind.COMPUTE]
        if len(set(homes)) == len(homes):  # no two are one
            return program.stream
    numbers = [
        first.setdefault(
            turn_of(program, number, model, shared_processor=shared), number
        )
        for number in range(len(program.streams))
    ]
    if numbers == list(range(len(numbers))):
        return program.stream
    return np.array(numbers, dtype=np.int32)[program.stream]


def others_in_turn(program: Program, cluster: Cluster) -> Edges:
    """Which instruction follows which on its stream, but for those in groups."""
    return turns_of_others(
        program, cluster.streams, shared_processor=cluster.shared_processor
    )


def in_program(program: Program, cluster: Cluster) -> Lists:
    """What each waits for by the program: `waits_for`, and what its groups add."""
    return needs(program, cluster.streams, shared_processor=cluster.shared_processor)


def not_in_program(program: Program, cluster: Cluster) -> Edges:
    """Which instruction must end before which may start, beside `waits_for`.

    A REDUCE, and a TIE, starts on all devices at once; of k buffers one must be free.
    """
    pairs = [meeting(program, _turns(program, cluster))]
    if isinstance(cluster.buffering, int):
        # A send waits until the receive k messages before is done.
        for members in program.by_stream:
            if len(members) and program.action[members[0]] == Action.SEND:
                late = members[cluster.buffering :]
                early = program.message[members[: len(late)]]
                pairs.append((program.recv_of[early].astype(np.int64), late))
    return (
        np.concatenate([before for before, _ in pairs]),
        np.concatenate([after for _, after in pairs]),
    )


def admitted_by_start(program: Program, cluster: Cluster) -> Edges:
    """Which receive must be posted before which send may start."""
    if cluster.buffering != "rendezvous":
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    sends = np.flatnonzero(program.action == Action.SEND)
    return program.recv_of[program.message[sends]].astype(np.int64), sends
