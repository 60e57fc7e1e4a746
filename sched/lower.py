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

from typing import Literal

import numpy as np

from pipeproof.sched.buffers import Buffers
from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Schedule
from pipeproof.sched.kernels import gathered
from pipeproof.sched.layout import (
    BEFORE,
    BEHIND,
    Hops,
    Layout,
    Nodes,
    hops_of,
    lay_out,
    steps_of,
)
from pipeproof.sched.program import LOWERED, Action, Lists, Program, side_by_side

Transfers = Literal["overlapped", "blocking"]
Receives = Literal["early", "late"]


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
    nodes = Nodes.of(schedule)
    hops = hops_of(schedule, table, nodes)
    blocking, late = transfers == "blocking", receives == "late"
    steps = steps_of(hops, nodes, blocking, late)
    layout = lay_out(schedule, nodes, hops, steps, BEFORE if late else BEHIND)
    buffers = Buffers(schedule, table, nodes, hops, layout)
    waits = [*_waits(nodes, hops, layout), *_beside(table, nodes, layout)]
    if blocking:
        waits.append(_blocking(nodes, hops, layout))
    if late:
        waits.append(_just_in_time(nodes, hops, layout, steps))
    else:
        waits.append(buffers.reuse())
    return _assemble(schedule, hops, layout, buffers, waits)


def _supported(schedule: Schedule) -> None:
    kinds = {Kind(kind) for kind in np.unique(schedule.ops.kind).tolist()}
    if missing := sorted(kind.name for kind in kinds - LOWERED):
        raise UnsupportedError(
            f"{schedule.summary}: {', '.join(missing)} can be written and checked, "
            "but not lowered to a program yet"
        )
    both = OpTable.of(schedule)
    if (both.has(Kind.R) & both.has(Kind.OFFLOAD)).any():
        raise UnsupportedError(
            f"{schedule.summary}: activations that are both offloaded and recomputed "
            "are not lowered; do one of the two for each micro-batch"
        )
    if schedule.steps > 1:
        raise UnsupportedError(
            f"{schedule.summary}: a schedule of several steps can be written and "
            "checked, but not lowered to a program yet; give it one step"
        )


Waits = tuple[Index, Index]
"""Pairs (instruction, what it waits for), on different streams of one device."""


def _waits(nodes: Nodes, hops: Hops, layout: Layout) -> list[Waits]:
    """A send waits for its producer, a consumer for its receive."""
    remote = hops.remote
    return [
        (layout.out[remote], layout.compute[hops.source[remote]]),
        (layout.compute[hops.target[remote]], layout.into[remote]),
    ]


def _blocking(nodes: Nodes, hops: Hops, layout: Layout) -> Waits:
    """The sender's next op waits for the send."""
    following = nodes.following[hops.source]
    blocked = hops.remote & (following >= 0)
    return layout.compute[following[blocked]], layout.out[blocked]


def _beside(table: OpTable, nodes: Nodes, layout: Layout) -> list[Waits]:
    """Copies and reductions wait for the device's ops before them.

    None behind them waits, but for a backward that needs what is reloaded.
    """
    beside = np.flatnonzero(nodes.beside & (nodes.previous >= 0))
    waits = [(layout.compute[beside], layout.compute[nodes.previous[beside]])]
    if Kind.RELOAD in table.by_kind:
        back = table.get(Kind.RELOAD)
        there = back >= 0
        reload = layout.compute[nodes.of_op[back[there]]]
        for other, after in (
            (table.get(Kind.OFFLOAD), False),
            (table.get(*BACKWARD_KINDS), True),
        ):
            ends = layout.compute[nodes.of_op[other[there]]]
            waits.append((ends, reload) if after else (reload, ends))
    return waits


def _just_in_time(nodes: Nodes, hops: Hops, layout: Layout, steps: Index) -> Waits:
    """A receive waits for the device's last op before its step."""
    remote = np.flatnonzero(hops.remote)
    stride = len(nodes.rank) + 1
    place = nodes.device.astype(np.int64) * stride + nodes.rank
    device = hops.target_device[remote]
    wanted = device.astype(np.int64) * stride + steps[remote]
    computes = np.flatnonzero(~nodes.beside)
    last = computes[np.searchsorted(place[computes], wanted) - 1]
    there = (nodes.device[last] == device) & (place[last] < wanted)
    return layout.into[remote[there]], layout.compute[last[there]]


def _assemble(
    schedule: Schedule,
    hops: Hops,
    layout: Layout,
    buffers: Buffers,
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
    messages = side_by_side(
        len(source),
        hops.kind[remote],
        ops.stage[source],
        ops.stage[target],
        0,  # the one port there is so far
        ops.micro_batch[source],
        ops.slice[source],
        hops.source_device[remote],
        hops.target_device[remote],
        layout.out[remote],
        layout.into[remote],
    )
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
        buffers.table[0] if len(buffers.table) == 1 else np.concatenate(buffers.table),
    )


def _lists(total: int, pairs: list[tuple[Index, Index]]) -> Lists:
    lists = Lists(*gathered(total, pairs, np.int32))
    pairs.clear()  # as large as the program, and not needed again
    return lists
