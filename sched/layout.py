"""The order of all instructions of a program, and the stream of each.

One canonical order that knows no costs: ops by the tick at which each could run
if every op took one tick and links were free, devices in turn within a tick. A
message's SEND and RECV stand together in it, beside an op that the policy of
lowering chooses.

Each loop here is one walk in that order (see `kernels`); it fills columns that
are there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable, csr, neighbours
from pipeproof.sched.ir import BACKWARD_KINDS, BESIDE_KINDS, Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.program import Action, Column, MessageKind, Stream, StreamKind
from pipeproof.sched.program import table as new_table

BEFORE, AT, BEHIND = 0, 1, 2
"""Where instructions go: before the op of their step, the op, behind it."""

_F, _B, _I = int(Kind.F), int(Kind.B), int(Kind.I)
_SEND, _RECV, _LOCAL = int(Action.SEND), int(Action.RECV), int(Action.LOCAL)
_ACTIVATION, _GRADIENT = int(MessageKind.ACTIVATION), int(MessageKind.GRADIENT)


@dataclass(frozen=True)
class Nodes:
    """The instructions that ops become: lone ops and overlap groups.

    Attributes:
        of_op: the node of each op.
        starts: first op of each node, and one behind the last.
        device: of each node.
        rank: place of each node in the canonical order.
        by_rank: the nodes in that order.
        kind: of its first op.
    """

    of_op: Index
    starts: Index
    device: NDArray[np.int32]
    rank: Index
    by_rank: Index
    kind: NDArray[np.int8]

    @classmethod
    def of(cls, schedule: Schedule) -> Nodes:
        """The nodes of a schedule without cycles."""
        level = schedule.level_of_node
        numbers = np.arange(len(level) + 1, dtype=np.int32)
        _, by_rank = csr(int(level.max(initial=0)) + 1, level, numbers[:-1])
        rank = np.empty(len(level), dtype=np.int32)
        rank[by_rank] = numbers[:-1]
        device, kind = schedule.device_of_op, schedule.ops.kind
        if len(level) == len(schedule):  # every op a node
            return cls(numbers[:-1], numbers, device, rank, by_rank, kind)
        first = np.flatnonzero(~schedule.ops.joined).astype(np.int32)
        starts = np.append(first, np.int32(len(schedule)))
        of_op = schedule.node_of_op
        return cls(of_op, starts, device[first], rank, by_rank, kind[first])

    @cached_property
    def beside(self) -> NDArray[np.bool_]:
        """Whether each runs beside the compute stream."""
        return np.isin(self.kind, BESIDE_KINDS)

    @cached_property
    def previous(self) -> Index:
        """The node before each on its device's compute stream, or -1."""
        return neighbours(self.device, ~self.beside)[0]

    @cached_property
    def following(self) -> Index:
        """The node behind each on its device's compute stream, or -1."""
        return neighbours(self.device, ~self.beside)[1]


@dataclass(frozen=True)
class Streams:
    """All streams, and which one carries what.

    Attributes:
        streams: as in `Program`.
        of_kind: the stream of an op, at kind × devices + device.
        down, up: the stream that sends a tensor on from a stage, or -1 where it
            stays on its device, at pipe × stages + stage. The one that receives
            it has the next number.
    """

    streams: tuple[Stream, ...]
    of_kind: NDArray[np.int32]
    down: NDArray[np.int32]
    up: NDArray[np.int32]

    @classmethod
    def of(cls, schedule: Schedule) -> Streams:
        """Compute streams by device, those of links by link, those beside last."""
        devices = schedule.devices
        streams = [Stream(device, StreamKind.COMPUTE) for device in range(devices)]
        homes = np.array(schedule.placement.pipes, dtype=np.int64)
        used = np.unique(schedule.pipe_of)
        upper, lower = homes[used, :-1].ravel(), homes[used, 1:].ravel()
        apart = upper != lower
        ends = [(upper, lower), (lower, upper)]
        codes = [source[apart] * devices + target[apart] for source, target in ends]
        pairs = np.unique(np.concatenate(codes))
        for a, b in (divmod(pair, devices) for pair in pairs.tolist()):
            streams += [Stream(a, StreamKind.SEND, b), Stream(b, StreamKind.RECV, a)]
        links = []
        for ahead, (source, target) in zip((0, 1), ends):
            link = np.full(homes.shape, -1, dtype=np.int32)
            number = devices + 2 * np.searchsorted(pairs, source * devices + target)
            stages = slice(ahead, ahead + homes.shape[1] - 1)
            link[used, stages] = np.where(apart, number, -1).reshape(len(used), -1)
            links.append(link.ravel())
        of_kind = np.tile(np.arange(devices, dtype=np.int32), (len(Kind), 1))
        for kind, (_, where) in BESIDE.items():
            mine = np.unique(schedule.device_of_op[schedule.ops.kind == kind]).tolist()
            for device in mine:
                of_kind[kind, device] = len(streams)
                streams.append(_beside(schedule, device, where))
        return cls(tuple(streams), of_kind.ravel(), *links)


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


def _beside(schedule: Schedule, device: int, kind: StreamKind) -> Stream:
    target = schedule.offload_to[device]
    if target is None or kind not in BETWEEN_DEVICES:
        return Stream(device, kind)
    return Stream(device, BETWEEN_DEVICES[kind], target)


@dataclass(frozen=True)
class Hops:
    """Tensors passed between neighbouring stages, in the order of production.

    Attributes:
        source, target: the ops that produce and consume each.
        link: the stream that sends it; -1 where it stays on its device.
        message: its number among those that do not, or -1.
        out_of, into: for each op, the hop that it produces and the one that it
            consumes; -1 for none, and never more than one.
    """

    source: Index
    target: Index
    link: Index
    message: Index
    out_of: Index
    into: Index

    @classmethod
    def of(
        cls, schedule: Schedule, table: OpTable, nodes: Nodes, streams: Streams
    ) -> Hops:
        """Activations down the stages and gradients up, in the order of production.

        Those of an overlap group come in the order of its ops.
        """
        ops = schedule.ops
        size = 2 * (schedule.stages - 1) * schedule.all_micro_batches * schedule.slices
        columns = [
            nodes.by_rank,
            nodes.starts,
            ops.kind,
            ops.stage,
            ops.micro_batch,
            table.place,
            schedule.pipe_of,
            table.get(Kind.F).ravel(),
            table.get(*BACKWARD_KINDS).ravel(),
            streams.down,
            streams.up,
            np.array([schedule.stages]),
            *(np.empty(size, dtype=np.int32) for _ in range(4)),
            *(np.full(len(ops), -1, dtype=np.int32) for _ in range(2)),
        ]
        return cls(*run(_produce, columns, results=[*range(12, 18)], size=len(ops)))

    @cached_property
    def messages(self) -> int:
        """How many cross devices."""
        return int(self.message.max(initial=-1)) + 1


def _produce(
    by_rank: Any,
    starts: Any,
    kind: Any,
    stage: Any,
    micro_batch: Any,
    place: Any,
    pipe_of: Any,
    forward: Any,
    backward: Any,
    down: Any,
    up: Any,
    sizes: Any,
    source: Any,
    target: Any,
    link: Any,
    message: Any,
    out_of: Any,
    into: Any,
) -> None:
    """Number the hops op by op, and note which op each one leads to."""
    stages = sizes[0]
    hop = 0
    sent = 0
    for rank in range(len(by_rank)):
        node = by_rank[rank]
        for op in range(starts[node], starts[node + 1]):
            at = stage[op]
            if kind[op] == _F and at < stages - 1:
                after = forward[place[op] + 1]
                over = down[pipe_of[micro_batch[op]] * stages + at]
            elif (kind[op] == _B or kind[op] == _I) and at > 0:
                after = backward[place[op] - 1]
                over = up[pipe_of[micro_batch[op]] * stages + at]
            else:
                continue
            source[hop] = op
            target[hop] = after
            out_of[op] = hop
            into[after] = hop
            link[hop] = over
            message[hop] = -1
            if over >= 0:
                message[hop] = sent
                sent += 1
            hop += 1


def steps_of(
    hops: Hops, nodes: Nodes, blocking: bool, late: bool, together: Index | None = None
) -> Index:
    """The rank of the node beside which each hop is appended.

    Args:
        hops: tensors under way.
        nodes: ops and groups.
        blocking: the sender's next op waits for its sends.
        late: receives are posted just in time.
        together: for each hop the other one of its exchange, or -1: both are
            appended as soon as both devices have produced theirs.
    """
    follows = nodes.following if blocking and late else nodes.rank[:0]
    joint = np.full(len(hops.source) if together is not None else 0, -1, dtype=np.int32)
    if together is not None:
        produced = nodes.rank[nodes.of_op[hops.source]]
        both = np.flatnonzero(together >= 0)
        joint[both] = np.maximum(produced[both], produced[together[both]]) + late
    columns = [
        hops.source,
        hops.target,
        hops.link,
        nodes.of_op,
        nodes.rank,
        follows,
        np.full(int(hops.link.max(initial=-1)) + 1, len(nodes.rank)),
        np.array([late], dtype=np.int8),
        joint,
        np.empty(len(hops.source), dtype=np.int32),
    ]
    return run(_step, columns, results=[9], size=len(hops.source))[0]


def _step(
    source: Any,
    target: Any,
    link: Any,
    node: Any,
    rank: Any,
    following: Any,
    lowest: Any,
    late: Any,
    joint: Any,
    step: Any,
) -> None:
    """Beside the producer, or before the consumer; an exchange where it must be.

    Backwards, so that what is sent first is, on each link, handed on no later than
    what is sent after it: links are first in, first out.
    """
    for hop in range(len(source) - 1, -1, -1):
        step[hop] = rank[node[source[hop]]]
        if len(joint) > 0 and joint[hop] >= 0:
            step[hop] = joint[hop]
            lowest[link[hop]] = min(lowest[link[hop]], joint[hop])
            continue
        if late[0] == 0 or link[hop] < 0:
            continue
        behind = rank[node[target[hop]]]
        if len(following) > 0:
            after = following[node[source[hop]]]
            if after >= 0:
                behind = min(behind, rank[after])
        behind = min(behind, lowest[link[hop]])
        lowest[link[hop]] = behind
        step[hop] = behind


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
    op_count: Column
    message: Column
    hop: Column
    compute: Index
    out: Index
    into: Index


def lay_out(
    schedule: Schedule,
    nodes: Nodes,
    hops: Hops,
    steps: Index,
    streams: Streams,
    phase_of_messages: int,
    order: Index | None = None,
) -> Layout:
    """Put every instruction in its place.

    Args:
        schedule: what is lowered.
        nodes: its ops and groups.
        hops: its tensors under way.
        steps: for each hop, the rank of the node beside which it is handed on.
        streams: of all instructions.
        phase_of_messages: BEFORE that node, or BEHIND it.
        order: all hops, as they come where several are handed on at one step;
            default in the order of production.
    """
    size = len(nodes.rank)
    every = np.arange(max(size + 1, len(steps)), dtype=np.int32)
    node_starts, node_at = every[: size + 1], nodes.by_rank
    if (nodes.kind == Kind.REDUCE).any():
        node_starts, node_at = csr(size, _meeting(schedule, nodes), every[:size])
    if order is None:
        hop_starts, hop_at = csr(size, steps, every[: len(steps)])
    else:
        hop_starts, hop_at = csr(size, steps[order], order)
    actions = [BESIDE.get(kind, (Action.COMPUTE, None))[0] for kind in Kind]
    total = size + len(steps) + hops.messages
    columns = [
        node_starts,
        node_at,
        nodes.starts,
        nodes.kind,
        nodes.device,
        streams.of_kind,
        np.array(actions, dtype=np.int8),
        hop_starts,
        hop_at,
        hops.source,
        hops.link,
        hops.message,
        nodes.of_op,
        np.array([schedule.devices, phase_of_messages]),
        np.empty(total, dtype=np.int32),
        np.empty(total, dtype=np.int8),
        *(np.empty(total, dtype=np.int32) for _ in range(4)),
        np.empty(size, dtype=np.int32),
        *(np.empty(len(steps), dtype=np.int32) for _ in range(2)),
    ]
    return Layout(*run(_append, columns, results=[*range(14, 23)], size=total))


def _append(
    node_starts: Any,
    node_at: Any,
    starts: Any,
    kind: Any,
    device: Any,
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
    """Step by step: what goes before its nodes, the nodes, what goes behind them."""
    devices, phase_of_messages = sizes[0], sizes[1]
    end = 0
    for step in range(len(node_starts) - 1):
        for phase in range(BEFORE, BEHIND + 1):
            if phase == AT:
                for place in range(node_starts[step], node_starts[step + 1]):
                    node = node_at[place]
                    stream[end] = stream_of_kind[kind[node] * devices + device[node]]
                    action[end] = action_of_kind[kind[node]]
                    first_op[end] = starts[node]
                    op_count[end] = starts[node + 1] - starts[node]
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


def _meeting(schedule: Schedule, nodes: Nodes) -> Index:
    """The rank of each node; of a REDUCE, the last of those that meet in it.

    All devices so come to their common reductions in one order, and no two can
    wait for each other in different ones.
    """
    rank = nodes.rank.copy()
    reduces = nodes.kind == Kind.REDUCE
    stage = schedule.ops.stage[nodes.starts[:-1][reduces]]
    latest = np.zeros(schedule.stages, dtype=np.int64)
    np.maximum.at(latest, stage, rank[reduces])
    rank[reduces] = latest[stage]
    return rank


def messages_of(schedule: Schedule, hops: Hops, layout: Layout) -> Column:
    """The messages, in columns as in `Program`."""
    ops = schedule.ops
    rows = new_table(hops.messages, 10)
    columns = [
        hops.source,
        hops.target,
        hops.message,
        layout.out,
        layout.into,
        ops.kind,
        ops.stage,
        ops.micro_batch,
        ops.slice,
        schedule.device_of_op,
        *rows.T,
    ]
    filled = run(_describe, columns, results=[*range(10, 20)], size=len(hops.source))
    for column, values in zip(rows.T, filled):
        column[:] = values
    return rows


def _describe(
    source: Any,
    target: Any,
    message: Any,
    out: Any,
    into: Any,
    op_kind: Any,
    stage: Any,
    micro_batch: Any,
    part: Any,
    device: Any,
    kind: Any,
    source_stage: Any,
    target_stage: Any,
    port: Any,
    its_micro_batch: Any,
    its_slice: Any,
    source_device: Any,
    target_device: Any,
    send: Any,
    recv: Any,
) -> None:
    for hop in range(len(source)):
        row = message[hop]
        if row < 0:
            continue
        before, after = source[hop], target[hop]
        kind[row] = _ACTIVATION if op_kind[before] == _F else _GRADIENT
        source_stage[row] = stage[before]
        target_stage[row] = stage[after]
        port[row] = 0  # the one there is so far
        its_micro_batch[row] = micro_batch[before]
        its_slice[row] = part[before]
        source_device[row] = device[before]
        target_device[row] = device[after]
        send[row] = out[hop]
        recv[row] = into[hop]
