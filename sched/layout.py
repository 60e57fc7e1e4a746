"""The order of all instructions of a program, and the stream of each.

They come in the canonical order of ops. A message's SEND and RECV stand together in
it, beside an op that the policy of lowering chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, csr
from pipeproof.sched.hops import Hops
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import run
from pipeproof.sched.lists import Column
from pipeproof.sched.nodes import BESIDE, Nodes, Streams

BEFORE, AT, BEHIND = 0, 1, 2
"""Where instructions go: before the op of their step, the op, behind it."""

_SEND, _RECV, _LOCAL = int(Action.SEND), int(Action.RECV), int(Action.LOCAL)
_REDUCE = int(Kind.REDUCE)


@dataclass(frozen=True)
class Layout:
    """The order of all instructions.

    Attributes:
        stream, action, first_op, op_count, message: as in `Program`.
        hop: per instruction, the hop that it hands on; -1 for those of ops.
        compute: the instruction of each node.
        out, into: the instructions that hand each hop on and bring it in; both
            are its LOCAL where it stays on the device.
    """

    stream: Column
    action: NDArray[np.int8]
    first_op: Column
    op_count: NDArray[np.signedinteger[Any]]
    message: Column
    hop: Column
    compute: Index
    out: Index
    into: Index


def lay_out(
    schedule: Schedule,
    nodes: Nodes,
    hops: Hops,
    handed: tuple[Index, Index],
    streams: Streams,
    phase_of_messages: int,
) -> Layout:
    """Put every instruction in its place.

    Args:
        schedule: what is lowered.
        nodes: its ops and groups.
        hops: its tensors under way.
        handed: which of these are handed on beside each node, as `handed_on` says.
        streams: of all instructions.
        phase_of_messages: BEFORE that node, or BEHIND it.
    """
    size, count = len(nodes.by_rank), len(hops.source)
    actions = [BESIDE.get(kind, (Action.COMPUTE, None))[0] for kind in Kind]
    total = size + count + hops.messages
    largest = int(np.diff(nodes.starts).max(initial=0)) if size < len(schedule) else 1
    room = new_columns(
        (total, np.int32),
        (total, np.int8),
        (total, np.int32),
        (total, np.int8 if largest < 128 else np.int32),
        (total, np.int32),
        # Where all hops cross devices they are the messages.
        (total if hops.messages < count else 0, np.int32),
        (size, np.int32),
        *[(count, np.int32)] * 2,
    )
    if hops.messages == count:
        room[5] = room[4]
    columns = [
        nodes.by_rank,
        nodes.starts,
        nodes.kind,
        nodes.device,
        schedule.ops.stage,
        *_reduces(schedule, nodes),
        streams.of_kind,
        np.array(actions, dtype=np.int8),
        *handed,
        hops.source,
        hops.link,
        hops.message,
        nodes.of_op,
        np.array([schedule.devices, phase_of_messages]),
        *room,
    ]
    return Layout(*run(_append, columns, results=[*range(17, 26)], size=total))


def _append(
    by_rank: Any,
    starts: Any,
    kind: Any,
    device: Any,
    stage: Any,
    reduces_at: Any,
    reduces: Any,
    left: Any,
    stream_of_kind: Any,
    action_of_kind: Any,
    hop_starts: Any,
    hop_at: Any,
    source: Any,
    link: Any,
    message_of: Any,
    node_of: Any,
    sizes: Any,
    stream: Any,
    action: Any,
    first_op: Any,
    op_count: Any,
    message: Any,
    hop_of: Any,
    compute: Any,
    out: Any,
    into: Any,
) -> None:
    """Step by step: what goes before its node, the node, what goes behind it.

    The REDUCEs of a stage stand together where the last of them does. All devices so
    come to their common ones in one order, and no two can wait for each other in
    different ones.
    """
    devices, phase_of_messages = sizes[0], sizes[1]
    lone = len(by_rank) == len(node_of)  # without groups
    end = 0
    for step in range(len(by_rank)):
        for phase in range(BEFORE, BEHIND + 1):
            if phase == AT:
                node, first, behind = by_rank[step], 0, 1
                reducing = kind[node] == _REDUCE
                if reducing:
                    at = stage[starts[node]]
                    left[at] -= 1
                    first, behind = reduces_at[at], reduces_at[at + 1]
                    if left[at] > 0:
                        behind = first
                for place in range(first, behind):
                    if reducing:
                        node = reduces[place]
                    stream[end] = stream_of_kind[kind[node] * devices + device[node]]
                    action[end] = action_of_kind[kind[node]]
                    first_op[end] = node if lone else starts[node]
                    op_count[end] = 1 if lone else starts[node + 1] - starts[node]
                    message[end] = -1
                    hop_of[end] = -1
                    compute[node] = end
                    end += 1
                continue
            for place in range(hop_starts[step], hop_starts[step + 1]):
                hop = hop_at[place]
                if link[hop] < 0:
                    if phase != BEHIND:
                        continue
                    stream[end] = device[node_of[source[hop]]]
                    action[end] = _LOCAL
                    out[hop] = end
                    count = 1
                else:
                    if phase != phase_of_messages:
                        continue
                    stream[end] = link[hop]
                    stream[end + 1] = link[hop] + 1
                    action[end] = _SEND
                    action[end + 1] = _RECV
                    out[hop] = end
                    count = 2
                for _ in range(count):
                    first_op[end] = -1
                    op_count[end] = 0
                    message[end] = message_of[hop]
                    hop_of[end] = hop
                    into[hop] = end  # the last of them
                    end += 1


def _reduces(schedule: Schedule, nodes: Nodes) -> tuple[Index, Index, Index]:
    """The REDUCEs of each stage: where they begin, the nodes, and how many."""
    reduces = np.flatnonzero(nodes.kind == Kind.REDUCE)
    stage = schedule.ops.stage[nodes.starts[reduces]]
    offsets, reduces = csr(schedule.stages, stage, reduces)
    return offsets, reduces, np.diff(offsets)
