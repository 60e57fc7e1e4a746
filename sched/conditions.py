"""What each instruction waits for on other streams of its device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.buffers import HOWS, Block
from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.hops import Hops
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import run
from pipeproof.sched.layout import Layout
from pipeproof.sched.lists import Lists
from pipeproof.sched.nodes import Nodes
from pipeproof.sched.touches import Touch, touching

_COMPUTE, _SEND, _RECV = map(int, (Action.COMPUTE, Action.SEND, Action.RECV))
_MOVES = Kind.OFFLOAD, Kind.RELOAD
_F, _B, _I = map(int, (Kind.F, Kind.B, Kind.I))
_RELOAD, _REDUCE = int(Kind.RELOAD), int(Kind.REDUCE)


def conditions(
    schedule: Schedule,
    table: OpTable,
    nodes: Nodes,
    hops: Hops,
    layout: Layout,
    how: NDArray[np.int8],
    *,
    blocking: bool,
    late: bool,
) -> tuple[Lists, Index]:
    """What each instruction waits for, and which slots are used again.

    Unless receives come just in time, what arrives takes over the slot of what has
    been freed: of its sort, the one freed first. Which those are is read off the
    canonical order.

    Args:
        schedule: what is lowered.
        table: where its ops stand.
        nodes: its ops and groups.
        hops: its tensors under way.
        layout: its instructions.
        how: for each place, as `how_of` says.
        blocking: an op waits for the sends of the one before it.
        late: receives wait for the device's ops so far.

    Returns:
        The waits; and for each hop the one whose slot it takes over, or -1.
    """
    total, count = len(layout.action), len(hops.source)
    beside = bool(nodes.beside.any())
    most = 2 * hops.messages + count + 2 * int(nodes.beside.sum())
    most += count * blocking + len(
        table.by_kind.get(Kind.RELOAD, nodes.by_rank[:0]).ravel()
    )
    summed = _summed(schedule)
    most += int((summed >= 0).sum())
    most_freed = 2 + 2 * len(schedule.skips)
    nowhere = np.zeros(0, dtype=np.int32)
    index: Any = np.int32 if most < 2**31 else np.int64
    kept = new_columns((total + 1, index), (most, np.int32), (count, np.int32))
    kept[0][0], kept[2][:] = 0, -1
    cells, slots = int(np.prod(table.shape)), int(hops.slot.max(initial=-1)) + 1
    scratch = new_columns((cells, np.int32), *[(count, np.int32)] * 2)
    scratch[0][:] = -1
    columns: list[NDArray[Any]] = [
        layout.action,
        layout.first_op,
        layout.op_count,
        layout.hop,
        layout.compute,
        layout.out,
        layout.into,
        schedule.ops.kind,
        table.place,
        layout.stream,
        schedule.device_of_op,
        nodes.of_op,
        nodes.previous if beside else nodes.by_rank[:0],
        hops.source,
        hops.target,
        hops.slot,
        hops.out_of,
        hops.into,
        hops.beside,
        how,
        scratch[0],
        *(table.by_kind.get(kind, nowhere).ravel() for kind in _MOVES),
        summed,
        touching(Touch.TAKE, Block.OUTPUT_GRAD),
        touching(Touch.TAKE, Block.INPUT),
        np.array([blocking, late]),
        np.full(schedule.devices, -1, dtype=np.int32),
        np.full(slots, -1, dtype=np.int32),
        np.empty(slots, dtype=np.int32),
        *scratch[1:],
        np.empty(most_freed * int(layout.op_count.max(initial=0)), dtype=np.int32),
        *kept,
    ]
    offsets, values, took = run(_wait, columns, results=[33, 34, 35], size=total)
    return Lists(offsets, values[: offsets[-1]]), took


def _summed(schedule: Schedule) -> Index:
    """For each STEP the REDUCE of its stage on its device, -1 for other ops.

    Empty where there is no STEP.
    """
    ops = schedule.ops
    if not schedule.has(Kind.STEP):
        return np.zeros(0, dtype=np.int32)
    result = np.full(len(ops), -1, dtype=np.int32)
    places = {
        kind: {
            (int(schedule.device_of_op[index]), *ops[index][1:]): index
            for index in np.flatnonzero(ops.kind == kind).tolist()
        }
        for kind in (Kind.REDUCE, Kind.STEP)
    }
    for place, index in places[Kind.STEP].items():
        result[index] = places[Kind.REDUCE].get(place, -1)
    return result


def _wait(
    action: Any,
    first_op: Any,
    op_count: Any,
    hop_of: Any,
    compute: Any,
    out: Any,
    arrival: Any,
    kind: Any,
    place: Any,
    stream: Any,
    device: Any,
    node: Any,
    previous: Any,
    source: Any,
    target: Any,
    slot_of: Any,
    out_of: Any,
    into: Any,
    also: Any,
    how: Any,
    brought: Any,
    away: Any,
    back: Any,
    summed: Any,
    takes_gradient: Any,
    takes_input: Any,
    policies: Any,
    last: Any,
    head: Any,
    tail: Any,
    behind: Any,
    freed_by: Any,
    freed: Any,
    waits_at: Any,
    waits: Any,
    took: Any,
) -> None:
    """Instruction by instruction, with each device's last COMPUTE so far.

    Free slots of one sort stand in a queue of the hops that filled them. The number
    of a device is that of its compute stream.
    """
    blocking, late = policies[0], policies[1]
    lone = len(compute) == len(node)  # without groups
    w = 0
    for i in range(len(action)):
        hop = hop_of[i]
        if hop >= 0:  # a tensor handed on
            if action[i] == _SEND:  # for its producer
                waits[w] = compute[source[hop] if lone else node[source[hop]]]
                w += 1
            elif action[i] == _RECV and late:  # just in time
                ready = last[device[target[hop]]]
                if ready >= 0:
                    waits[w] = ready
                    w += 1
            elif action[i] == _RECV:  # for a free slot
                old = head[slot_of[hop]]
                if old >= 0:
                    head[slot_of[hop]] = behind[old]
                    took[hop] = old
                    waits[w] = freed_by[old]
                    w += 1
            waits_at[i + 1] = w
            continue
        begin = first_op[i]
        end = begin + op_count[i]
        first = w
        for op in range(begin, end):  # ops wait for what arrives, in order of hops
            hop = into[op]
            while hop >= 0:
                if slot_of[hop] >= 0:
                    spot = w
                    while spot > first and hop_of[waits[spot - 1]] > hop:
                        waits[spot] = waits[spot - 1]
                        spot -= 1
                    waits[spot] = arrival[hop]
                    w += 1
                hop = also[hop] if len(also) > 0 else -1
        if action[i] == _COMPUTE:
            for op in range(begin, end if len(back) > 0 else begin):  # reloaded
                if kind[op] != _B and kind[op] != _I:
                    continue
                if back[place[op]] >= 0:
                    waits[w] = compute[node[back[place[op]]]]
                    w += 1
            if len(summed) > 0 and summed[begin] >= 0:  # for its gradient's sum
                waits[w] = compute[node[summed[begin]]]
                w += 1
            before = last[stream[i]]
            if blocking and before >= 0:  # for the sends of the op before
                for op in range(first_op[before], first_op[before] + op_count[before]):
                    hop = out_of[op]
                    while 0 <= hop < len(source) and source[hop] == op:
                        if slot_of[hop] >= 0:
                            waits[w] = out[hop]
                            w += 1
                        hop += 1
            last[stream[i]] = i
        else:
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
        if late:
            continue
        count = 0
        for op in range(begin, end):  # what it frees that has arrived, in their order
            if kind[op] >= _REDUCE:
                continue
            at = place[op]
            if kind[op] == _F:
                brought[at] = into[op]
                continue
            row = kind[op] * HOWS + how[at]
            for side in range(2):
                hop = -1
                if side == 0 and takes_gradient[row]:
                    hop = into[op]
                elif side == 1 and takes_input[row]:
                    hop = brought[at]
                while hop >= 0:
                    if slot_of[hop] >= 0:
                        spot = count
                        while spot > 0 and freed[spot - 1] > hop:
                            freed[spot] = freed[spot - 1]
                            spot -= 1
                        freed[spot] = hop
                        count += 1
                    hop = also[hop] if len(also) > 0 else -1
        for spot in range(count):
            hop = freed[spot]
            slot = slot_of[hop]
            freed_by[hop] = i
            behind[hop] = -1
            if head[slot] < 0:
                head[slot] = hop
            else:
                behind[tail[slot]] = hop
            tail[slot] = hop
