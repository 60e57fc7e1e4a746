"""What each operation waits for, derived from the operations themselves.

The default chain of micro-batch m through stages s (and slices q)::

    F(s-1,m,q) → F(s,m,q)        activations go down
    F(s,m,q-1) → F(s,m,q)        keys and values of the earlier slices
    F(s,m,q)   → R(s,m,q)        the stored input
    F or R     → B or I          the activations
    B/I(s+1)   → B/I(s)          gradients come up
    B/I(q+1)   → B/I(q)          the keys' and values' gradients
    I          → W
    F → OFFLOAD → RELOAD → B/I   activations away and back
    B/W of a stage, on every device → REDUCE → STEP

Skip connections add nothing: F(0) is before F(3) anyhow, and B(3) before B(0).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.ir import BACKWARD_KINDS, BESIDE_KINDS, STAGE_KINDS, Kind, Schedule
from pipeproof.sched.kernels import columns as new_columns
from pipeproof.sched.kernels import csr as csr
from pipeproof.sched.kernels import levels, run

Index = NDArray[np.signedinteger[Any]]
"""Numbers of ops, nodes, instructions or buffers; int32 where many are kept."""

ABSENT = -1


@dataclass(frozen=True)
class OpTable:
    """Where each operation of a schedule stands.

    Attributes:
        by_kind: for each kind with a micro-batch that occurs, an array of shape
            (micro-batches of all steps, slices, stages): the index of the op in
            `schedule.ops`, or -1. The first one, where an op stands twice.
    """

    schedule: Schedule
    by_kind: dict[Kind, Index]

    @classmethod
    def of(cls, schedule: Schedule) -> OpTable:
        """Tables of a schedule whose numbers are all in range."""
        result = cls(schedule, {})
        ops = schedule.ops
        counts = np.bincount(ops.kind, minlength=len(Kind))
        kinds = [k for k in Kind if counts[k] and k not in STAGE_KINDS]
        table_of = np.full(len(Kind), ABSENT)
        table_of[kinds] = range(len(kinds))
        size = int(np.prod(result.shape))
        where = np.full(len(kinds) * size, ABSENT, dtype=np.int32)
        columns: list[NDArray[Any]] = [ops.kind, result.place, table_of * size, where]
        run(_stand, columns, results=[3], size=len(ops))
        for kind, table in zip(kinds, where.reshape(len(kinds), *result.shape)):
            result.by_kind[kind] = table
        return result

    def has(self, kind: Kind) -> NDArray[np.bool_]:
        """Where there is an op of this kind."""
        if kind in self.by_kind:
            return self.by_kind[kind] >= 0
        return np.zeros(self.shape, dtype=np.bool_)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Micro-batches of all steps, slices, stages."""
        schedule = self.schedule
        return schedule.all_micro_batches, schedule.slices, schedule.stages

    @cached_property
    def place(self) -> NDArray[np.int32]:
        """For each op its (micro-batch, slice, stage) as one number.

        That is where it stands in a table laid out flat. Of ops of a stage, which
        have no micro-batch, it says nothing.
        """
        ops = self.schedule.ops
        place = ops.micro_batch * np.int32(self.schedule.slices)
        place += ops.slice
        place *= np.int32(self.schedule.stages)
        place += ops.stage
        return place

    @cached_property
    def cell(self) -> NDArray[np.int32]:
        """For each op its stage, counted through all pipes.

        An op of a stage counts in the first pipe that has the stage on its device.
        """
        schedule, ops = self.schedule, self.schedule.ops
        if len(schedule.placement.pipes) == 1:
            return ops.stage
        pipe = schedule.pipe_of[ops.micro_batch].astype(np.int32)
        of_stage = np.flatnonzero(np.isin(ops.kind, list(STAGE_KINDS)))
        if len(of_stage):  # of the pipe that has the stage on this device
            homes = np.array(schedule.placement.pipes)[:, ops.stage[of_stage]]
            here = homes == schedule.device_of_op[of_stage]
            pipe[of_stage] = here.argmax(axis=0)
        return pipe * np.int32(schedule.stages) + ops.stage

    @cached_property
    def dependencies(self) -> tuple[Index, Index]:
        """Every pair (before, after) of op indices that the ops themselves order.

        Pairs with an op that is missing are left out: `check` reports the gap.
        """
        return _dependencies(self)

    def get(self, *kinds: Kind) -> Index:
        """Index of the op of the first of these kinds that is there, else -1."""
        result: Index | None = None
        for kind in kinds:
            table = self.by_kind.get(kind)
            if table is not None:
                result = (
                    table if result is None else np.where(result < 0, table, result)
                )
        if result is None:
            result = np.full(self.shape, ABSENT, dtype=np.int32)
        return result


def _stand(kind: Any, place: Any, table: Any, where: Any) -> None:
    """Backwards, so that the first of an op that stands twice is what is kept."""
    for op in range(len(kind) - 1, -1, -1):
        if table[kind[op]] >= 0:
            where[table[kind[op]] + place[op]] = op


def _dependencies(table: OpTable) -> tuple[Index, Index]:
    forward = table.get(Kind.F)
    backward = table.get(*BACKWARD_KINDS)
    pairs = [
        _pairs(forward[..., :-1], forward[..., 1:]),
        _pairs(forward[:, :-1], forward[:, 1:]),
        _pairs(forward, backward),
        _pairs(backward[..., 1:], backward[..., :-1]),
        _pairs(backward[:, 1:], backward[:, :-1]),
    ]
    if Kind.W in table.by_kind:
        pairs.append(_pairs(table.get(Kind.I), table.get(Kind.W)))
    if Kind.R in table.by_kind:
        again = table.get(Kind.R)
        pairs += [_pairs(forward, again), _pairs(again, backward)]
    if Kind.OFFLOAD in table.by_kind or Kind.RELOAD in table.by_kind:
        away, back = table.get(Kind.OFFLOAD), table.get(Kind.RELOAD)
        pairs += [_pairs(forward, away), _pairs(away, back), _pairs(back, backward)]
    pairs += _of_stages(table)
    return (
        np.concatenate([before for before, _ in pairs]),
        np.concatenate([after for _, after in pairs]),
    )


def _pairs(before: Index, after: Index) -> tuple[Index, Index]:
    both = (before >= 0) & (after >= 0)
    return before[both], after[both]


def _of_stages(table: OpTable) -> list[tuple[Index, Index]]:
    """Contributions → REDUCE → STEP, stage by stage and step by step."""
    schedule, ops = table.schedule, table.schedule.ops
    stage_ops = np.flatnonzero(np.isin(ops.kind, list(STAGE_KINDS)))
    if not len(stage_ops):
        return []
    finished = table.get(Kind.B, Kind.W)
    reduced: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in np.flatnonzero(ops.kind == Kind.REDUCE).tolist():
        reduced[int(ops.stage[index]), int(ops.micro_batch[index])].append(index)
    pairs: list[tuple[Index, Index]] = []
    for after in stage_ops.tolist():
        stage, step = int(ops.stage[after]), int(ops.micro_batch[after])
        first = step * schedule.micro_batches
        before: Index = finished[first : first + schedule.micro_batches, :, stage]
        before = before[before >= 0]
        if ops.kind[after] == Kind.STEP:
            if (stage, step) in reduced:
                before = np.array(reduced[stage, step])
            else:
                device = schedule.device_of_op
                before = before[device[before] == device[after]]
        pairs.append((before, np.full(len(before), after)))
    return pairs + (_of_ties(schedule) if schedule.ties else [])


def _of_ties(schedule: Schedule) -> list[tuple[Index, Index]]:
    """All that adds to a tie's stages, and to others of the device → STEP of one."""
    ops, device = schedule.ops, schedule.device_of_op
    of_stage = ops.kind == Kind.REDUCE
    adds = np.flatnonzero(of_stage | (ops.kind == Kind.B) | (ops.kind == Kind.W))
    step = np.where(of_stage, 1, schedule.micro_batches)[adds]
    step = ops.micro_batch[adds] // step
    pairs: list[tuple[Index, Index]] = []
    for after in np.flatnonzero(ops.kind == Kind.STEP).tolist():
        own = int(ops.stage[after])
        ties = [tie for tie in schedule.ties if own in tie]
        if not ties:
            continue
        waited = np.isin(ops.stage[adds], [stage for tie in ties for stage in tie])
        waited |= device[adds] == device[after]
        waited &= (ops.stage[adds] != own) & (step == ops.micro_batch[after])
        before = adds[waited]
        pairs.append((before, np.full(len(before), after)))
    return pairs


@dataclass(frozen=True)
class Order:
    """A schedule's ops as nodes in a graph of what must precede what.

    A node is an op, or an overlap group, whose ops start together.

    Attributes:
        level: int64 per node, the longest path to it in ops (the tick at which
            it starts when every op takes one tick and links are free); -1 on or
            behind a cycle.
        first_op: int64 per node, the index of its first op.
        before, after: the edges between nodes, dependencies and device order.
    """

    level: Index
    first_op: Index
    before: Index
    after: Index


def order(schedule: Schedule, table: OpTable) -> Order:
    """Level every node by device order and dependencies together."""
    node = schedule.node_of_op
    first_op = np.flatnonzero(~schedule.ops.joined)
    before, after = table.dependencies
    before, after = node[before], node[after]
    apart = before != after
    device = schedule.device_of_op[first_op]
    kind = schedule.ops.kind[first_op]
    computes = ~np.isin(kind, BESIDE_KINDS)
    edges_from, edges_to = [before[apart]], [after[apart]]
    previous = neighbours(device, computes)
    for copies in (Kind.OFFLOAD, Kind.RELOAD):  # each on a stream, in order
        mine = kind == copies
        if not mine.any():
            continue
        ahead = neighbours(device, mine)
        following = np.flatnonzero(mine & (ahead >= 0)).astype(np.int32)
        edges_from.append(ahead[following])
        edges_to.append(following)
    behind = np.flatnonzero(previous >= 0).astype(np.int32)
    edges_from.append(previous[behind])
    edges_to.append(behind)
    sources, targets = np.concatenate(edges_from), np.concatenate(edges_to)
    level = levels(len(first_op), sources, targets)
    return Order(level, first_op, sources, targets)


def neighbours(
    device: NDArray[np.int32], counts: NDArray[np.bool_], *, behind: bool = False
) -> Index:
    """For each node the nearest on its device that counts, before or behind; or -1."""
    (near,) = new_columns((len(device), np.int32))
    columns = [device, counts, np.array([behind]), near]
    return run(_neighbours, columns, results=[3], size=len(device))[0]


def _neighbours(device: Any, counts: Any, behind: Any, near: Any) -> None:
    """Devices ascend."""
    size = len(device)
    last = -1
    for place in range(size):
        node = size - 1 - place if behind[0] else place
        if last >= 0 and device[last] != device[node]:
            last = -1
        near[node] = last
        if counts[node]:
            last = node
