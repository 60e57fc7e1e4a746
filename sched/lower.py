"""Schedule → Program: messages, streams, buffers and waits.

The lowering walks one canonical order that knows no costs: ops by the tick at
which each could run if every op took one tick and links were free, devices in
turn within a tick. At each step of it, a message's SEND and RECV are appended
together, so in the resulting list every instruction comes after all it can ever
wait for, a rendezvous with the other side included. No cycle of waits can
exist, whatever the transport buffers: the program cannot deadlock.

Where a step lies for a message is the policy:

* `receives="early"`: right behind the op that produces it. The receive is posted
  as soon as its buffer is free, long before the data is needed.
* `receives="late"`: right before the op that consumes it, or one that consumes
  a later message of the same link, since links are first in, first out. The
  receive also waits for the device's compute so far.
* `transfers="blocking"`: the sender's next op waits until the message is sent,
  as Megatron does without overlap; the step then lies no later than that op.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable, Order, csr, order
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Schedule
from pipeproof.sched.program import (
    COMPUTED,
    Action,
    BufferKind,
    Lists,
    MessageKind,
    Program,
    Stream,
    StreamKind,
)

Transfers = Literal["overlapped", "blocking"]
Receives = Literal["early", "late"]

BEFORE, AT, BEHIND = 0, 1, 2
"""Where a step's instructions go: before its op, the op, behind it."""


def lower(
    schedule: Schedule,
    *,
    transfers: Transfers = "overlapped",
    receives: Receives = "early",
) -> Program:
    """What each device does on each of its streams.

    Args:
        schedule: one that `check` finds clean.
        transfers: beside the compute stream, or blocking the sender's.
        receives: posted as early as their buffers allow, or just in time.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: an unknown policy.
        UnsupportedError: ops that are not lowered yet.
    """
    if transfers not in ("overlapped", "blocking"):
        raise ParameterError(
            f"transfers must be 'overlapped' or 'blocking', got {transfers!r}"
        )
    if receives not in ("early", "late"):
        raise ParameterError(f"receives must be 'early' or 'late', got {receives!r}")
    schedule.report.raise_if_bad()
    _supported(schedule)
    table = OpTable.of(schedule)
    nodes = _Nodes.of(schedule, order(schedule, table))
    hops = _hops(schedule, table, nodes)
    blocking, late = transfers == "blocking", receives == "late"
    steps = _steps(hops, nodes, blocking, late)
    layout = _lay_out(schedule, nodes, hops, steps, BEFORE if late else BEHIND)
    buffers = _Buffers(schedule, table, nodes, hops, layout)
    waits = _waits(nodes, hops, layout)
    if blocking:
        waits.append(_blocking(nodes, hops, layout))
    if late:
        waits.append(_just_in_time(nodes, hops, layout, steps))
    else:
        waits.append(buffers.reuse())
    return _assemble(schedule, hops, layout, buffers, waits)


def _supported(schedule: Schedule) -> None:
    kinds = {Kind(kind) for kind in np.unique(schedule.ops.kind).tolist()}
    if missing := sorted(kind.name for kind in kinds - COMPUTED):
        raise UnsupportedError(
            f"{schedule.summary}: {', '.join(missing)} can be written and checked, "
            "but not lowered to a program yet"
        )
    if schedule.steps > 1:
        raise UnsupportedError(
            f"{schedule.summary}: a schedule of several steps can be written and "
            "checked, but not lowered to a program yet; give it one step"
        )


@dataclass(frozen=True)
class _Nodes:
    """The compute instructions to be: lone ops and overlap groups.

    Attributes:
        of_op: the node of each op.
        first_op, ops: first op and number of ops of each node.
        device: of each node.
        rank: place of each node in the canonical order.
        following: the next node on the same device, or -1.
    """

    of_op: Index
    first_op: Index
    ops: Index
    device: NDArray[np.int32]
    rank: Index
    following: Index

    @classmethod
    def of(cls, schedule: Schedule, graph: Order) -> _Nodes:
        first = graph.first_op
        device = schedule.device_of_op[first]
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(graph.level, kind="stable")] = np.arange(len(first))
        following = np.arange(1, len(first) + 1)
        last = np.append(device[1:] != device[:-1], True)
        following[last] = -1
        sizes = np.diff(np.append(first, len(schedule)))
        return cls(schedule.node_of_op, first, sizes, device, rank, following)


@dataclass(frozen=True)
class _Hops:
    """Tensors passed between neighbouring stages, in the order of production.

    Attributes:
        kind: of `MessageKind`.
        source_op, target_op: the ops that produce and consume it.
        source, target: the nodes of these.
        source_device, target_device: where they run.
        remote: whether it crosses devices and so is a message.
    """

    kind: NDArray[np.int8]
    source_op: Index
    target_op: Index
    source: Index
    target: Index
    source_device: NDArray[np.int32]
    target_device: NDArray[np.int32]

    @property
    def remote(self) -> NDArray[np.bool_]:
        return self.source_device != self.target_device

    @property
    def pair(self) -> Index:
        """A number for each ordered pair of devices."""
        devices = 1 + max(
            int(self.source_device.max(initial=0)),
            int(self.target_device.max(initial=0)),
        )
        return self.source_device.astype(np.int64) * devices + self.target_device


def _hops(schedule: Schedule, table: OpTable, nodes: _Nodes) -> _Hops:
    forward, backward = table.get(Kind.F), table.get(*BACKWARD_KINDS)
    down = forward[..., :-1].ravel(), forward[..., 1:].ravel()
    up = backward[..., 1:].ravel(), backward[..., :-1].ravel()
    source_op, target_op = (np.concatenate(ends) for ends in zip(down, up))
    kind = np.repeat(
        np.array([MessageKind.ACTIVATION, MessageKind.GRADIENT], dtype=np.int8),
        [len(down[0]), len(up[0])],
    )
    by_production = np.lexsort((source_op, nodes.rank[nodes.of_op[source_op]]))
    source_op, target_op = source_op[by_production], target_op[by_production]
    source, target = nodes.of_op[source_op], nodes.of_op[target_op]
    return _Hops(
        kind[by_production],
        source_op,
        target_op,
        source,
        target,
        nodes.device[source],
        nodes.device[target],
    )


def _steps(hops: _Hops, nodes: _Nodes, blocking: bool, late: bool) -> Index:
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
class _Layout:
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


def _lay_out(
    schedule: Schedule, nodes: _Nodes, hops: _Hops, steps: Index, phase_of_messages: int
) -> _Layout:
    streams, send_stream, recv_stream = _streams(schedule, hops)
    remote, local = np.flatnonzero(hops.remote), np.flatnonzero(~hops.remote)
    none_n, none_h = np.full(len(nodes.rank), -1), np.full(len(hops.kind), -1)
    all_nodes = np.arange(len(nodes.rank))
    local_node = nodes.rank[hops.source[local]]
    # One block each: computes, hand-overs on a device, sends, receives.
    step = np.concatenate([nodes.rank, local_node, steps[remote], steps[remote]])
    sizes = [len(all_nodes), len(local), len(remote), len(remote)]
    phase = np.repeat([AT, BEHIND, phase_of_messages, phase_of_messages], sizes)
    hop = np.concatenate([none_n, local, remote, remote])
    actions = [Action.COMPUTE, Action.LOCAL, Action.SEND, Action.RECV]
    action = np.repeat(np.array(actions, dtype=np.int8), sizes)
    stream = np.concatenate(
        [
            nodes.device,
            hops.source_device[local],
            send_stream[remote],
            recv_stream[remote],
        ]
    )
    node = np.concatenate([all_nodes, np.repeat(none_h, 2)[: sum(sizes[1:])]])
    place = np.lexsort((action, hop, phase, step))
    where = np.empty(len(place), dtype=np.int64)
    where[place] = np.arange(len(place))
    bounds = np.cumsum(sizes)
    out, into = none_h.copy(), none_h.copy()
    out[local] = into[local] = where[bounds[0] : bounds[1]]
    out[remote] = where[bounds[1] : bounds[2]]
    into[remote] = where[bounds[2] :]
    return _Layout(
        stream[place].astype(np.int32),
        action[place],
        node[place],
        hop[place],
        where[: bounds[0]],
        out,
        into,
        streams,
    )


def _streams(
    schedule: Schedule, hops: _Hops
) -> tuple[tuple[Stream, ...], Index, Index]:
    """All streams, and for each hop that of its SEND and of its RECV."""
    pairs, number = np.unique(hops.pair[hops.remote], return_inverse=True)
    streams = [Stream(device, StreamKind.COMPUTE) for device in range(schedule.devices)]
    source = dict(zip(hops.pair.tolist(), hops.source_device.tolist()))
    target = dict(zip(hops.pair.tolist(), hops.target_device.tolist()))
    for pair in pairs.tolist():
        a, b = source[pair], target[pair]
        streams += [Stream(a, StreamKind.SEND, b), Stream(b, StreamKind.RECV, a)]
    send = np.full(len(hops.kind), -1, dtype=np.int64)
    send[hops.remote] = schedule.devices + 2 * number
    return tuple(streams), send, send + 1


Waits = tuple[Index, Index]
"""Pairs (instruction, what it waits for), on different streams of one device."""


def _waits(nodes: _Nodes, hops: _Hops, layout: _Layout) -> list[Waits]:
    """A send waits for its producer, a consumer for its receive."""
    remote = hops.remote
    return [
        (layout.out[remote], layout.compute[hops.source[remote]]),
        (layout.compute[hops.target[remote]], layout.into[remote]),
    ]


def _blocking(nodes: _Nodes, hops: _Hops, layout: _Layout) -> Waits:
    """The sender's next op waits for the send."""
    following = nodes.following[hops.source]
    blocked = hops.remote & (following >= 0)
    return layout.compute[following[blocked]], layout.out[blocked]


def _just_in_time(nodes: _Nodes, hops: _Hops, layout: _Layout, steps: Index) -> Waits:
    """A receive waits for the device's last op before its step."""
    remote = np.flatnonzero(hops.remote)
    stride = len(nodes.rank) + 1
    place = nodes.device.astype(np.int64) * stride + nodes.rank
    device = hops.target_device[remote]
    wanted = device.astype(np.int64) * stride + steps[remote]
    last = np.searchsorted(place, wanted) - 1
    there = (last >= 0) & (nodes.device[last] == device)
    return layout.into[remote[there]], layout.compute[last[there]]


@dataclass
class _Buffers:
    """Who writes, reads and frees which buffer.

    Rows of `table` have the columns of `Program.buffers`. `reads`, `writes` and
    `frees` are pairs (instructions, buffers).
    """

    schedule: Schedule
    ops: OpTable
    nodes: _Nodes
    hops: _Hops
    layout: _Layout
    table: list[NDArray[np.int64]] = field(default_factory=list)
    reads: list[tuple[Index, Index]] = field(default_factory=list)
    writes: list[tuple[Index, Index]] = field(default_factory=list)
    frees: list[tuple[Index, Index]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        forward = self.ops.get(Kind.F).ravel()
        self.backward = self.ops.get(*BACKWARD_KINDS).ravel()
        weight = self.ops.get(Kind.W).ravel()
        again = self.ops.get(Kind.R).ravel()
        self.split = weight >= 0
        self.last = np.where(self.split, weight, self.backward)
        self.writer = np.where(again >= 0, again, forward)
        self.forward, self.again, self.weight = forward, again, weight
        self._stashes()
        self._inputs()
        self._outputs_and_gradients()
        self._accumulators()

    def _at(self, ops: Index) -> Index:
        return self.layout.compute[self.nodes.of_op[ops]]

    def _new(self, kind: BufferKind | NDArray[np.int64], ops: Index) -> Index:
        """One buffer for each op, on the op's device."""
        columns = self.schedule.ops
        self.table.append(
            np.column_stack(
                [
                    np.broadcast_to(kind, len(ops)),
                    self.schedule.device_of_op[ops],
                    columns.stage[ops],
                    columns.micro_batch[ops],
                    columns.slice[ops],
                    np.full(len(ops), -1),
                ]
            ).astype(np.int64)
        )
        self.count += len(ops)
        return np.arange(self.count - len(ops), self.count)

    def _stashes(self) -> None:
        activation = self._new(BufferKind.ACTIVATION, self.forward)
        self.writes.append((self._at(self.writer), activation))
        self.reads.append((self._at(self.backward), activation))
        self.frees.append((self._at(self.backward), activation))
        split = self.split
        stash = self._new(BufferKind.WEIGHT_STASH, self.forward[split])
        self.writes += [
            (self._at(self.writer[split]), stash),
            (self._at(self.backward[split]), stash),
        ]
        self.reads.append((self._at(self.weight[split]), stash))
        self.frees.append((self._at(self.weight[split]), stash))

    def _inputs(self) -> None:
        """Inputs arrive, but for the first stage's, which its F brings in."""
        recomputed = self.again >= 0
        kind = np.where(recomputed, BufferKind.STORED_INPUT, BufferKind.INPUT)
        inputs = self._new(kind.astype(np.int64), self.forward)
        first = self.schedule.ops.stage[self.forward] == 0
        self.writes.append((self._at(self.forward[first]), inputs[first]))
        self.reads += [
            (self._at(self.forward[~first]), inputs[~first]),
            (self._at(self.again[recomputed]), inputs[recomputed]),
            (self._at(self.last), inputs),
        ]
        self.frees.append((self._at(self.last), inputs))
        self.input_of_op = np.full(len(self.schedule), -1, dtype=np.int64)
        self.input_of_op[self.forward] = inputs

    def _outputs_and_gradients(self) -> None:
        hops, layout = self.hops, self.layout
        down = hops.kind == MessageKind.ACTIVATION
        kinds = np.where(down, BufferKind.OUTPUT, BufferKind.INPUT_GRAD)
        out = self._new(kinds.astype(np.int64), hops.source_op)
        self.writes.append((self._at(hops.source_op), out))
        self.reads.append((layout.out, out))
        self.frees.append((layout.out, out))
        gradient = self._new(BufferKind.OUTPUT_GRAD, hops.target_op[~down])
        self.reads.append((self._at(hops.target_op[~down]), gradient))
        self.frees.append((self._at(hops.target_op[~down]), gradient))
        self.arrives = np.empty(len(hops.kind), dtype=np.int64)
        self.arrives[down] = self.input_of_op[hops.target_op[down]]
        self.arrives[~down] = gradient
        self.writes.append((layout.into, self.arrives))

    def _accumulators(self) -> None:
        """One gradient for each stage on each device that contributes to it."""
        stage = self.schedule.ops.stage[self.last]
        device = self.schedule.device_of_op[self.last]
        key = device.astype(np.int64) * self.schedule.stages + stage
        _, example, number = np.unique(key, return_index=True, return_inverse=True)
        gradient = self._new(BufferKind.GRADIENT, self.last[example])
        self.table[-1][:, 3:5] = -1, 0
        self.writes.append((self._at(self.last), gradient[number]))

    def reuse(self) -> Waits:
        """Let arriving tensors take over the slots of freed ones, and wait for it.

        A slot belongs to one kind of tensor of one stage. Which slot is free is
        read off the canonical order; the one freed first is taken first.
        """
        table = np.concatenate(self.table)
        freed_by = np.full(self.count, -1, dtype=np.int64)
        for instruction, buffer in self.frees:
            freed_by[buffer] = instruction
        remote = self.hops.remote
        arrives, recv = self.arrives[remote], self.layout.into[remote]
        key = self.hops.kind[remote] * self.schedule.stages + table[arrives, 2]
        key = key * self.schedule.devices + table[arrives, 1]
        by_key = np.lexsort((recv, key))
        _, starts = np.unique(key[by_key], return_index=True)
        waiting: list[Index] = []
        for members in np.split(by_key, starts[1:]):
            born, buffer = recv[members], arrives[members]
            by_death = buffer[np.argsort(freed_by[buffer])]
            free = np.searchsorted(freed_by[by_death], born)
            count = np.arange(1, len(born) + 1)
            # taken[k+1] = min(taken[k] + 1, free[k]): take a free slot if any.
            taken = np.minimum.accumulate(free - count + 1) + count - 1
            taken = np.minimum(taken, count)
            before = np.concatenate([[0], taken[:-1]])
            reused = taken > before
            table[buffer[reused], 5] = by_death[before[reused]]
            waiting.append(buffer[reused])
        self.table = [table]
        buffers = np.concatenate([*waiting, np.empty(0, dtype=np.int64)])
        recv_of = np.full(self.count, -1, dtype=np.int64)
        recv_of[arrives] = recv
        return recv_of[buffers], freed_by[table[buffers, 5]]


def _assemble(
    schedule: Schedule,
    hops: _Hops,
    layout: _Layout,
    buffers: _Buffers,
    waits: list[Waits],
) -> Program:
    total = len(layout.stream)
    remote = hops.remote
    number = np.full(len(remote), -1, dtype=np.int32)
    number[remote] = np.arange(int(remote.sum()))
    has_node, is_message = layout.node >= 0, layout.action != Action.LOCAL
    is_message &= layout.hop >= 0
    first_op = np.full(total, -1, dtype=np.int64)
    op_count = np.zeros(total, dtype=np.int32)
    message = np.full(total, -1, dtype=np.int32)
    node = layout.node[has_node]
    first_op[has_node] = buffers.nodes.first_op[node]
    op_count[has_node] = buffers.nodes.ops[node]
    message[is_message] = number[layout.hop[is_message]]
    ops, source, target = schedule.ops, hops.source_op[remote], hops.target_op[remote]
    messages = np.column_stack(
        [
            hops.kind[remote],
            ops.stage[source],
            ops.stage[target],
            np.zeros(len(source)),
            ops.micro_batch[source],
            ops.slice[source],
            hops.source_device[remote],
            hops.target_device[remote],
            layout.out[remote],
            layout.into[remote],
        ]
    ).astype(np.int32)
    return Program(
        schedule,
        layout.streams,
        layout.stream,
        layout.action,
        first_op,
        op_count,
        message,
        _lists(total, waits),
        _lists(total, buffers.reads),
        _lists(total, buffers.writes),
        _lists(total, buffers.frees),
        messages,
        np.concatenate(buffers.table).astype(np.int32),
    )


def _lists(total: int, pairs: list[tuple[Index, Index]]) -> Lists:
    rows = np.concatenate([row for row, _ in pairs])
    values = np.concatenate([value for _, value in pairs])
    offsets, grouped = csr(total, rows, values)
    return Lists(offsets, grouped.astype(np.int32))
