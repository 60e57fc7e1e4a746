"""The order of all instructions of a program, and the stream of each.

One canonical order that knows no costs: ops by the tick at which each could run
if every op took one tick and links were free, devices in turn within a tick. A
message's SEND and RECV stand together in it, beside an op that the policy of
lowering chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable, csr, neighbours
from pipeproof.sched.ir import BACKWARD_KINDS, BESIDE_KINDS, Kind, Schedule
from pipeproof.sched.kernels import numbered
from pipeproof.sched.program import Action, MessageKind, Stream, StreamKind

BEFORE, AT, BEHIND = 0, 1, 2
"""Where instructions go: before the op of their step, the op, behind it."""


@dataclass(frozen=True)
class Nodes:
    """The instructions that ops become: lone ops and overlap groups.

    Attributes:
        of_op: the node of each op.
        first_op, ops: first op and number of ops of each node.
        device: of each node.
        rank: place of each node in the canonical order.
        kind: of its first op.
        beside: whether it runs beside the compute stream.
        previous, following: the node before and behind it on its device's compute
            stream, or -1.
    """

    of_op: Index
    first_op: Index
    ops: Index
    device: NDArray[np.int32]
    rank: Index
    kind: NDArray[np.int8]
    beside: NDArray[np.bool_]
    previous: Index
    following: Index

    @classmethod
    def of(cls, schedule: Schedule) -> Nodes:
        """The nodes of a schedule without cycles."""
        first = np.flatnonzero(~schedule.ops.joined).astype(np.int32)
        device = schedule.device_of_op[first]
        level = schedule.level_of_node
        numbers = np.arange(len(first), dtype=np.int32)
        _, by_level = csr(int(level.max(initial=0)) + 1, level, numbers)
        rank = np.empty(len(first), dtype=np.int32)
        rank[by_level] = numbers
        kind = schedule.ops.kind[first]
        beside = np.isin(kind, BESIDE_KINDS)
        previous, following = neighbours(device, ~beside)
        sizes = np.diff(np.append(first, len(schedule)))
        return cls(
            schedule.node_of_op,
            first,
            sizes,
            device,
            rank,
            kind,
            beside,
            previous,
            following,
        )


@dataclass(frozen=True)
class Hops:
    """Tensors passed between neighbouring stages, in the order of production.

    Attributes:
        kind: of `MessageKind`.
        source_op, target_op: the ops that produce and consume it.
        source, target: the nodes of these.
        source_device, target_device: where they run.
    """

    kind: NDArray[np.int8]
    source_op: Index
    target_op: Index
    source: Index
    target: Index
    source_device: NDArray[np.int32]
    target_device: NDArray[np.int32]

    @cached_property
    def remote(self) -> NDArray[np.bool_]:
        """Which of them cross devices, and so are messages."""
        crosses: NDArray[np.bool_] = self.source_device != self.target_device
        return crosses

    @cached_property
    def pair(self) -> Index:
        """A number for each ordered pair of devices."""
        devices = 1 + max(
            int(self.source_device.max(initial=0)),
            int(self.target_device.max(initial=0)),
        )
        return self.source_device.astype(np.int64) * devices + self.target_device


def hops_of(schedule: Schedule, table: OpTable, nodes: Nodes) -> Hops:
    """Activations down the stages and gradients up, in the order of production."""
    forward, backward = table.get(Kind.F), table.get(*BACKWARD_KINDS)
    down = forward[..., :-1].ravel(), forward[..., 1:].ravel()
    up = backward[..., 1:].ravel(), backward[..., :-1].ravel()
    source_op, target_op = (np.concatenate(ends) for ends in zip(down, up))
    kind = np.repeat(
        np.array([MessageKind.ACTIVATION, MessageKind.GRADIENT], dtype=np.int8),
        [len(down[0]), len(up[0])],
    )
    # Ops by rank, those of a group in their order; an op produces one hop at most.
    every = np.arange(len(schedule), dtype=np.int32)
    _, ops = csr(len(nodes.rank), nodes.rank[nodes.of_op], every)
    hop_of_op = np.full(len(schedule), -1, dtype=np.int32)
    hop_of_op[source_op] = np.arange(len(source_op), dtype=np.int32)
    by_production = hop_of_op[ops]
    by_production = by_production[by_production >= 0]
    source_op, target_op = source_op[by_production], target_op[by_production]
    source, target = nodes.of_op[source_op], nodes.of_op[target_op]
    return Hops(
        kind[by_production],
        source_op,
        target_op,
        source,
        target,
        nodes.device[source],
        nodes.device[target],
    )


def steps_of(hops: Hops, nodes: Nodes, blocking: bool, late: bool) -> Index:
    """The rank of the op beside which each hop is appended."""
    if not late:
        return nodes.rank[hops.source]
    step = nodes.rank[hops.target].copy()
    if blocking:
        following = nodes.following[hops.source]
        has_one = following >= 0
        step[has_one] = np.minimum(step[has_one], nodes.rank[following[has_one]])
    # First in, first out: no later than any later message of the same link.
    by_pair = np.argsort(hops.pair, kind="stable")
    _, starts = np.unique(hops.pair[by_pair], return_index=True)
    for members in np.split(by_pair, starts[1:]):
        step[members] = np.minimum.accumulate(step[members][::-1])[::-1]
    return step


@dataclass(frozen=True)
class Layout:
    """The order of all instructions.

    Attributes:
        stream, action, node, hop: per instruction; node or hop is -1.
        compute: the instruction of each node.
        out, into: the instructions that hand each hop on and bring it in; both
            are its LOCAL where it stays on the device.
        streams: as in `Program`.
    """

    stream: NDArray[np.int32]
    action: NDArray[np.int8]
    node: Index
    hop: Index
    compute: Index
    out: Index
    into: Index
    streams: tuple[Stream, ...]


def lay_out(
    schedule: Schedule, nodes: Nodes, hops: Hops, steps: Index, phase_of_messages: int
) -> Layout:
    """Put every instruction in its place.

    Args:
        schedule: what is lowered.
        nodes: its ops and groups.
        hops: its tensors under way.
        steps: for each hop, the rank of the op beside which it is handed on.
        phase_of_messages: BEFORE that op, or BEHIND it.
    """
    streams, send_stream, recv_stream = _streams(schedule, hops)
    node_stream, streams = _with_streams_beside(schedule, nodes, streams)
    remote, local = (
        np.flatnonzero(mask).astype(np.int32) for mask in (hops.remote, ~hops.remote)
    )
    all_nodes = np.arange(len(nodes.rank), dtype=np.int32)
    local_node = nodes.rank[hops.source[local]]
    # One block each: nodes, hand-overs on a device, sends, receives.
    step = np.concatenate(
        [_meeting(schedule, nodes), local_node, steps[remote], steps[remote]],
        dtype=np.int64,  # it becomes a part of a long key
    )
    sizes = [len(all_nodes), len(local), len(remote), len(remote)]
    phases = [AT, BEHIND, phase_of_messages, phase_of_messages]
    phase = np.repeat(np.array(phases, dtype=np.int8), sizes)
    hop = np.concatenate([np.full_like(all_nodes, -1), local, remote, remote])
    actions = [Action.COMPUTE, Action.LOCAL, Action.SEND, Action.RECV]
    action = np.repeat(np.array(actions, dtype=np.int8), sizes)
    for beside, what in BESIDE.items():
        action[: len(all_nodes)][nodes.kind == beside] = what[0]
    stream = np.concatenate(
        [
            node_stream,
            hops.source_device[local],
            send_stream[remote],
            recv_stream[remote],
        ]
    )
    node = np.concatenate([all_nodes, np.full(sum(sizes[1:]), -1, dtype=np.int32)])
    # By step, phase, hop and action, in one number: sorted once, not four times.
    key = ((step * 3 + phase) * (len(hops.kind) + 1) + hop + 1) * len(Action) + action
    place = np.argsort(key, kind="stable")
    where = np.empty(len(place), dtype=np.int32)
    where[place] = np.arange(len(place), dtype=np.int32)
    bounds = np.cumsum(sizes)
    out = np.empty(len(hops.kind), dtype=np.int32)
    into = np.empty_like(out)
    out[local] = into[local] = where[bounds[0] : bounds[1]]
    out[remote] = where[bounds[1] : bounds[2]]
    into[remote] = where[bounds[2] :]
    return Layout(
        stream[place].astype(np.int32),
        action[place],
        node[place],
        hop[place],
        where[: bounds[0]],
        out,
        into,
        streams,
    )


def _streams(schedule: Schedule, hops: Hops) -> tuple[tuple[Stream, ...], Index, Index]:
    """All streams, and for each hop that of its SEND and of its RECV."""
    remote = np.flatnonzero(hops.remote)
    pair = hops.source_device[remote].astype(np.int64) * schedule.devices
    pairs, number = numbered(pair + hops.target_device[remote])
    streams = [Stream(device, StreamKind.COMPUTE) for device in range(schedule.devices)]
    for a, b in (divmod(pair, schedule.devices) for pair in pairs.tolist()):
        streams += [Stream(a, StreamKind.SEND, b), Stream(b, StreamKind.RECV, a)]
    send = np.full(len(hops.kind), -1, dtype=np.int32)
    send[remote] = schedule.devices + 2 * number
    return tuple(streams), send, send + 1


def _meeting(schedule: Schedule, nodes: Nodes) -> Index:
    """The rank of each node; of a REDUCE, the last of those that meet in it.

    All devices so come to their common reductions in one order, and no two can
    wait for each other in different ones.
    """
    rank = nodes.rank.copy()
    reduces = nodes.kind == Kind.REDUCE
    stage = schedule.ops.stage[nodes.first_op[reduces]]
    latest = np.zeros(schedule.stages, dtype=np.int64)
    np.maximum.at(latest, stage, rank[reduces])
    rank[reduces] = latest[stage]
    return rank


BESIDE = {
    Kind.OFFLOAD: (Action.COPY, StreamKind.TO_HOST),
    Kind.RELOAD: (Action.COPY, StreamKind.FROM_HOST),
    Kind.REDUCE: (Action.REDUCE, StreamKind.REDUCE),
}
"""What the kinds that run beside the compute stream become, and where."""

BETWEEN_DEVICES = {
    StreamKind.TO_HOST: StreamKind.TO_DEVICE,
    StreamKind.FROM_HOST: StreamKind.FROM_DEVICE,
}
"""Where copies go instead if they go to another device's memory."""


def _with_streams_beside(
    schedule: Schedule, nodes: Nodes, streams: tuple[Stream, ...]
) -> tuple[NDArray[np.int32], tuple[Stream, ...]]:
    """The stream of each node, and all streams, those beside the others last."""
    stream = nodes.device.copy()
    for kind, (_, where) in BESIDE.items():
        mine = nodes.kind == kind
        devices, number = np.unique(nodes.device[mine], return_inverse=True)
        stream[mine] = len(streams) + number
        streams += tuple(
            _beside(schedule, device, where) for device in devices.tolist()
        )
    return stream, streams


def _beside(schedule: Schedule, device: int, kind: StreamKind) -> Stream:
    target = schedule.offload_to[device]
    if target is None or kind not in BETWEEN_DEVICES:
        return Stream(device, kind)
    return Stream(device, BETWEEN_DEVICES[kind], target)
