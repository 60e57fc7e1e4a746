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
* `messages="grouped"`: where two devices exchange messages between the same two ops
  of each, both do so in one group; see `exchange`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.buffers import Blocks
from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.errors import ParameterError, UnsupportedError
from pipeproof.sched.exchange import exchanges, groups_of, in_exchanges
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.layout import (
    BEFORE,
    BEHIND,
    Hops,
    Layout,
    Nodes,
    Streams,
    lay_out,
    messages_of,
    steps_of,
)
from pipeproof.sched.program import LOWERED, Action, Lists, Program
from pipeproof.sched.touches import members, touches

_COMPUTE, _SEND, _RECV = map(int, (Action.COMPUTE, Action.SEND, Action.RECV))
_B, _I, _RELOAD = int(Kind.B), int(Kind.I), int(Kind.RELOAD)

Transfers = Literal["overlapped", "blocking"]
Receives = Literal["early", "late"]
Messages = Literal["single", "grouped"]

POLICIES: dict[str, tuple[str, ...]] = {
    "transfers": get_args(Transfers),
    "receives": get_args(Receives),
    "messages": get_args(Messages),
}
"""The policies of lowering and their values, the default one first."""


def lower(
    schedule: Schedule,
    *,
    transfers: Transfers = "overlapped",
    receives: Receives = "early",
    messages: Messages = "single",
) -> Program:
    """What each device does on each of its streams.

    Args:
        schedule: one that `check` finds clean.
        transfers: beside the compute stream, or blocking the sender's.
        receives: posted as early as their buffers allow, or just in time.
        messages: each posted by itself, or what two devices exchange between two
            ops in one group, as torch's `batch_isend_irecv` does.

    Raises:
        ScheduleError: `check` has findings.
        ParameterError: an unknown policy.
        UnsupportedError: ops that are not lowered yet.
    """
    asked = {"transfers": transfers, "receives": receives, "messages": messages}
    for name, value in asked.items():
        if value not in POLICIES[name]:
            known = " or ".join(map(repr, POLICIES[name]))
            raise ParameterError(f"{name} must be {known}, got {value!r}")
    schedule.report.raise_if_bad()
    _supported(schedule)
    table = schedule.table
    nodes = Nodes.of(schedule)
    streams = Streams.of(schedule)
    hops = Hops.of(schedule, table, nodes, streams)
    blocking, late = transfers == "blocking", receives == "late"
    together = exchanges(nodes, hops) if messages == "grouped" else None
    steps = steps_of(hops, nodes, blocking, late, together)
    order = None if together is None else in_exchanges(together)
    phase = BEFORE if late else BEHIND
    layout = lay_out(schedule, nodes, hops, steps, streams, phase, order)
    blocks = Blocks.of(schedule, table, hops)
    touched = touches(schedule, table, nodes, hops, layout, blocks, reuse=not late)
    return Program(
        schedule,
        streams.streams,
        layout.stream,
        layout.action,
        layout.first_op,
        layout.op_count,
        layout.message,
        _waits(schedule, table, nodes, hops, layout, touched.room, blocking, late),
        touched.reads,
        touched.writes,
        touched.frees,
        messages_of(schedule, hops, layout),
        blocks.rows,
        Lists.of([]) if together is None else groups_of(together, layout),
    )


def _supported(schedule: Schedule) -> None:
    kinds = {Kind(kind) for kind in np.unique(schedule.ops.kind).tolist()}
    if missing := sorted(kind.name for kind in kinds - LOWERED):
        raise UnsupportedError(
            f"{schedule.summary}: {', '.join(missing)} can be written and checked, "
            "but not lowered to a program yet"
        )
    both = schedule.table
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


def _waits(
    schedule: Schedule,
    table: OpTable,
    nodes: Nodes,
    hops: Hops,
    layout: Layout,
    room: Index,
    blocking: bool,
    late: bool,
) -> Lists:
    """What each instruction waits for on other streams of its device."""
    total = len(layout.action)
    beside = bool(nodes.beside.any())
    most = 2 * hops.messages + len(hops.source) + 2 * int(nodes.beside.sum())
    most += len(hops.source) * blocking + int(table.has(Kind.RELOAD).sum())
    index: Any = np.int32 if most < 2**31 else np.int64
    columns: list[NDArray[Any]] = [
        layout.action,
        layout.first_op,
        layout.op_count,
        layout.hop,
        layout.compute,
        layout.out,
        layout.into,
        members(table, nodes),
        schedule.ops.kind,
        table.place,
        schedule.device_of_op,
        nodes.of_op,
        nodes.previous if beside else nodes.rank[:0],
        hops.source,
        hops.target,
        hops.link,
        hops.out_of,
        hops.into,
        room,
        table.get(Kind.OFFLOAD).ravel(),
        table.get(Kind.RELOAD).ravel(),
        np.array([blocking, late]),
        np.full(schedule.devices, -1, dtype=np.int32),
        np.zeros(total + 1, dtype=index),
        np.empty(most, dtype=np.int32),
    ]
    offsets, values = run(_wait, columns, results=[23, 24], size=total)
    return Lists(offsets, values[: offsets[-1]])


def _wait(
    action: Any,
    first_op: Any,
    op_count: Any,
    hop_of: Any,
    compute: Any,
    out: Any,
    arrival: Any,
    member: Any,
    kind: Any,
    place: Any,
    device: Any,
    node: Any,
    previous: Any,
    source: Any,
    target: Any,
    link: Any,
    out_of: Any,
    into: Any,
    room: Any,
    away: Any,
    back: Any,
    policies: Any,
    last: Any,
    waits_at: Any,
    waits: Any,
) -> None:
    """Instruction by instruction, with each device's last COMPUTE so far."""
    blocking, late = policies[0], policies[1]
    w = 0
    for i in range(len(action)):
        hop = hop_of[i]
        begin = first_op[i]
        end = begin + op_count[i]
        if action[i] == _SEND:  # for its producer
            waits[w] = compute[node[source[hop]]]
            w += 1
        elif action[i] == _RECV:  # just in time, or for a free slot
            ready = last[device[target[hop]]] if late else room[hop]
            if ready >= 0:
                waits[w] = ready
                w += 1
        first = w
        for op in range(begin, end):  # ops wait for what arrives, in order of hops
            hop = into[op]
            if hop < 0 or link[hop] < 0:
                continue
            spot = w
            while spot > first and hop_of[waits[spot - 1]] > hop:
                waits[spot] = waits[spot - 1]
                spot -= 1
            waits[spot] = arrival[hop]
            w += 1
        if action[i] == _COMPUTE:
            for j in range(begin, end):  # for what is reloaded
                op = member[j]
                if kind[op] != _B and kind[op] != _I:
                    continue
                if back[place[op]] >= 0:
                    waits[w] = compute[node[back[place[op]]]]
                    w += 1
            before = last[device[begin]]
            if blocking and before >= 0:  # for the sends of the op before
                for op in range(first_op[before], first_op[before] + op_count[before]):
                    hop = out_of[op]
                    if hop >= 0 and link[hop] >= 0:
                        waits[w] = out[hop]
                        w += 1
            last[device[begin]] = i
        elif op_count[i] > 0:
            # Beside the others: for the device's ops before it. None behind it
            # waits, but for a backward that needs what is reloaded.
            before = previous[node[begin]]
            if before >= 0:
                waits[w] = compute[before]
                w += 1
            if kind[begin] == _RELOAD:
                waits[w] = compute[node[away[place[begin]]]]
                w += 1
        waits_at[i + 1] = w
