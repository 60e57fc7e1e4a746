"""Who writes, reads and frees which buffer, and in which slots they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.buffers import AGAIN, MOVED, SPLIT, Blocks
from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.layout import Hops, Layout, Nodes
from pipeproof.sched.program import Action, Lists

_F, _B, _I, _W, _R = map(int, (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R))
_OFFLOAD, _RELOAD, _REDUCE = map(int, (Kind.OFFLOAD, Kind.RELOAD, Kind.REDUCE))
_SEND, _RECV = int(Action.SEND), int(Action.RECV)


@dataclass(frozen=True)
class Touches:
    """What each instruction does to which buffers.

    Attributes:
        writes, reads, frees: as in `Program`.
        room: for each hop the instruction that frees the slot it arrives in; -1
            where it takes over none.
    """

    writes: Lists
    reads: Lists
    frees: Lists
    room: Index


def touches(
    schedule: Schedule,
    table: OpTable,
    nodes: Nodes,
    hops: Hops,
    layout: Layout,
    blocks: Blocks,
    reuse: bool,
) -> Touches:
    """What each instruction does to which buffers; fills in `takes_over`.

    Args:
        schedule: what is lowered.
        table: where its ops stand.
        nodes: its ops and groups.
        hops: its tensors under way.
        layout: its instructions.
        blocks: its buffers.
        reuse: let arriving tensors take over the slots of freed ones. A slot
            belongs to one kind of tensor of one stage. Which slot is free is read
            off the canonical order; the one freed first is taken first.
    """
    ops, count, total = schedule.ops, len(hops.source), len(layout.action)
    homes = np.array(schedule.placement.pipes, dtype=np.int32)
    most = 4 * len(ops) + count
    index: Any = np.int32 if most < 2**31 else np.int64
    columns: list[NDArray[Any]] = [
        layout.action,
        layout.first_op,
        layout.op_count,
        layout.hop,
        members(table, nodes),
        ops.kind,
        ops.stage,
        ops.micro_batch,
        table.place,
        schedule.device_of_op,
        schedule.pipe_of,
        homes.ravel(),
        blocks.accumulated,
        np.array([schedule.stages, len(homes), reuse]),
        table.get(Kind.F).ravel(),
        blocks.how,
        blocks.moved,
        blocks.split,
        blocks.moved_split,
        blocks.starts,
        hops.out_of,
        hops.into,
        hops.link,
        blocks.arrives,
        blocks.slot,
        np.full(blocks.slots, -1, dtype=np.int32),
        np.full(blocks.slots, -1, dtype=np.int32),
        np.empty(count, dtype=np.int32),
        np.empty(count, dtype=np.int32),
        np.empty(2 * int(layout.op_count.max(initial=0)), dtype=np.int32),
        *(np.zeros(total + 1, dtype=index) for _ in range(3)),
        *(np.empty(most, dtype=np.int32) for _ in range(3)),
        blocks.rows[:, 5],
        np.full(count, -1, dtype=np.int32),
    ]
    results = [*range(30, 38)]
    found = run(_touch, columns, results=results, size=total)
    writes, reads, frees = (
        Lists(at, values[: at[-1]]) for at, values in zip(found[:3], found[3:6])
    )
    return Touches(writes, reads, frees, room=found[7])


def members(table: OpTable, nodes: Nodes) -> Index:
    """All ops, those of each overlap group by place."""
    if len(nodes.rank) == len(nodes.of_op):
        return nodes.of_op
    return np.lexsort((table.place, nodes.of_op)).astype(np.int32)


def _touch(
    action: Any,
    first_op: Any,
    op_count: Any,
    hop_of: Any,
    member: Any,
    kind: Any,
    stage: Any,
    micro_batch: Any,
    place: Any,
    device: Any,
    pipe_of: Any,
    homes: Any,
    accumulated: Any,
    sizes: Any,
    forward: Any,
    how: Any,
    moved: Any,
    split: Any,
    moved_split: Any,
    starts: Any,
    out_of: Any,
    into: Any,
    link: Any,
    arrives: Any,
    slot_of: Any,
    head: Any,
    tail: Any,
    behind: Any,
    freed_by: Any,
    freed: Any,
    writes_at: Any,
    reads_at: Any,
    frees_at: Any,
    writes: Any,
    reads: Any,
    frees: Any,
    takes_over: Any,
    room: Any,
) -> None:
    """Instruction by instruction; of a group, each sort of buffer in turn.

    Free slots of one sort stand in a queue of the hops that filled them.
    """
    stages, pipes, reuse = sizes[0], sizes[1], sizes[2]
    kept, kept_away, kept_back = starts[0], starts[1], starts[2]
    stash, stash_away, stash_back = starts[3], starts[4], starts[5]
    inputs, inputs_away, inputs_back = starts[6], starts[7], starts[8]
    handed, gradients = starts[9], starts[11]
    w = 0
    r = 0
    f = 0
    for i in range(len(action)):
        hop = hop_of[i]
        if hop >= 0:  # a tensor handed on
            if action[i] != _RECV:
                reads[r] = handed + hop
                frees[f] = handed + hop
                r += 1
                f += 1
            if action[i] != _SEND:
                writes[w] = arrives[hop]
                w += 1
            writes_at[i + 1] = w
            reads_at[i + 1] = r
            frees_at[i + 1] = f
            slot = slot_of[hop]
            if reuse and action[i] == _RECV and head[slot] >= 0:
                old = head[slot]
                head[slot] = behind[old]
                takes_over[arrives[hop]] = arrives[old]
                room[hop] = freed_by[old]
            continue
        begin = first_op[i]
        end = begin + op_count[i]

        # What it writes.
        for j in range(begin, end):  # activations
            op = member[j]
            at, what = place[op], kind[op]
            if what == _R or (what == _F and not how[at] & AGAIN):
                writes[w] = kept + at
                w += 1
            elif what == _OFFLOAD:
                writes[w] = kept_away + moved[at]
                w += 1
            elif what == _RELOAD:
                writes[w] = kept_back + moved[at]
                w += 1
        for j in range(begin, end):  # what W will need
            op = member[j]
            at, what = place[op], kind[op]
            if what == _REDUCE or not how[at] & SPLIT:
                continue
            if what == _R or (what == _F and not how[at] & AGAIN):
                writes[w] = stash + split[at]
                w += 1
            elif what == _OFFLOAD:
                writes[w] = stash_away + moved_split[at]
                w += 1
            elif what == _RELOAD:
                writes[w] = stash_back + moved_split[at]
                w += 1
        for j in range(begin, end):  # I adds to it
            op = member[j]
            at = place[op]
            if kind[op] == _I:
                lies = moved_split[at] if how[at] & MOVED else -1
                writes[w] = stash + split[at] if lies < 0 else stash_back + lies
                w += 1
        for j in range(begin, end):  # the first stage's inputs, which it brings in
            op = member[j]
            at, what = place[op], kind[op]
            if what == _F and into[op] < 0:
                writes[w] = inputs + at
                w += 1
            elif what == _OFFLOAD:
                writes[w] = inputs_away + moved[at]
                w += 1
            elif what == _RELOAD:
                writes[w] = inputs_back + moved[at]
                w += 1
        for op in range(begin, end):  # outputs and gradients of inputs
            if out_of[op] >= 0:
                writes[w] = handed + out_of[op]
                w += 1
        for j in range(begin, end):  # the accumulated gradient
            op = member[j]
            at, what = place[op], kind[op]
            if what in (_B, _W):
                pipe = pipe_of[micro_batch[op]]
                writes[w] = gradients + accumulated[pipe * stages + stage[op]]
                w += 1
            elif what == _REDUCE:
                for pipe in range(pipes):
                    if homes[pipe * stages + stage[op]] == device[op]:
                        own = gradients + accumulated[pipe * stages + stage[op]]
                writes[w] = own
                w += 1
                reads[r] = own
                r += 1

        # What it reads, and mostly frees.
        for j in range(begin, end):  # activations
            op = member[j]
            at, what = place[op], kind[op]
            if what in (_B, _I):
                lies = moved[at] if how[at] & MOVED else -1
                reads[r] = kept + at if lies < 0 else kept_back + lies
            elif what == _OFFLOAD:
                reads[r] = kept + at
            elif what == _RELOAD:
                reads[r] = kept_away + moved[at]
            else:
                continue
            frees[f] = reads[r]
            r += 1
            f += 1
        for j in range(begin, end):  # what W needs
            op = member[j]
            at, what = place[op], kind[op]
            if what == _REDUCE or not how[at] & SPLIT:
                continue
            if what == _W:
                lies = moved_split[at] if how[at] & MOVED else -1
                reads[r] = stash + split[at] if lies < 0 else stash_back + lies
            elif what == _OFFLOAD:
                reads[r] = stash + split[at]
            elif what == _RELOAD:
                reads[r] = stash_away + moved_split[at]
            else:
                continue
            frees[f] = reads[r]
            r += 1
            f += 1
        for j in range(begin, end):  # inputs that arrived
            op = member[j]
            if kind[op] == _F and into[op] >= 0:
                reads[r] = inputs + place[op]
                r += 1
        for j in range(begin, end):  # inputs that were stored
            op = member[j]
            if kind[op] == _R:
                reads[r] = inputs + place[op]
                r += 1
        for j in range(begin, end):  # inputs for the last time
            op = member[j]
            at, what = place[op], kind[op]
            if what in (_W, _B):
                lies = moved[at] if how[at] & MOVED else -1
                reads[r] = inputs + at if lies < 0 else inputs_back + lies
            elif what == _OFFLOAD:
                reads[r] = inputs + at
            elif what == _RELOAD:
                reads[r] = inputs_away + moved[at]
            else:
                continue
            frees[f] = reads[r]
            r += 1
            f += 1
        first = r
        for op in range(begin, end):  # gradients of outputs, in the order of hops
            if kind[op] != _F and into[op] >= 0:
                buffer = arrives[into[op]]
                spot = r
                while spot > first and reads[spot - 1] > buffer:
                    reads[spot] = reads[spot - 1]
                    spot -= 1
                reads[spot] = buffer
                r += 1
        for spot in range(first, r):
            frees[f] = reads[spot]
            f += 1

        writes_at[i + 1] = w
        reads_at[i + 1] = r
        frees_at[i + 1] = f

        # Slots that are free from now on.
        if reuse == 0:
            continue
        count = 0
        for op in range(begin, end):  # hops whose buffers it frees, in their order
            at, what = place[op], kind[op]
            for side in range(2):
                hop = -1
                if side == 0 and (what in (_B, _I)):
                    hop = into[op]
                elif side == 1 and (
                    what == _OFFLOAD or ((what in (_B, _W)) and not how[at] & MOVED)
                ):
                    hop = into[forward[at]]
                if hop < 0 or link[hop] < 0:
                    continue
                spot = count
                while spot > 0 and freed[spot - 1] > hop:
                    freed[spot] = freed[spot - 1]
                    spot -= 1
                freed[spot] = hop
                count += 1
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
