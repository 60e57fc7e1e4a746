"""The buffers of a program: who writes, reads and frees them, and their slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Schedule
from pipeproof.sched.layout import Hops, Layout, Nodes
from pipeproof.sched.program import BufferKind, MessageKind, side_by_side

Pairs = tuple[Index, Index]
"""(instructions, buffers), or (instructions, what they wait for)."""


@dataclass
class Buffers:
    """Who writes, reads and frees which buffer.

    Rows of `table` have the columns of `Program.buffers`. `reads`, `writes` and
    `frees` are pairs (instructions, buffers).
    """

    schedule: Schedule
    ops: OpTable
    nodes: Nodes
    hops: Hops
    layout: Layout
    table: list[NDArray[np.int32]] = field(default_factory=list)
    reads: list[Pairs] = field(default_factory=list)
    writes: list[Pairs] = field(default_factory=list)
    frees: list[Pairs] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        forward = self.ops.get(Kind.F).ravel()
        self.backward = self.ops.get(*BACKWARD_KINDS).ravel()
        weight = self.ops.get(Kind.W).ravel()
        again = self.ops.get(Kind.R).ravel()
        self.away = self.ops.get(Kind.OFFLOAD).ravel()
        self.back = self.ops.get(Kind.RELOAD).ravel()
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
            side_by_side(
                len(ops),
                kind,
                self.schedule.device_of_op[ops],
                columns.stage[ops],
                columns.micro_batch[ops],
                columns.slice[ops],
                -1,
            )
        )
        self.count += len(ops)
        return np.arange(self.count - len(ops), self.count, dtype=np.int32)

    def _stashes(self) -> None:
        activation = self._new(BufferKind.ACTIVATION, self.forward)
        self.writes.append((self._at(self.writer), activation))
        held = self._away_and_back(activation)
        self.reads.append((self._at(self.backward), held))
        self.frees.append((self._at(self.backward), held))
        split = self.split
        stash = self._new(BufferKind.WEIGHT_STASH, self.forward[split])
        self.writes.append((self._at(self.writer[split]), stash))
        held = self._away_and_back(stash, split)
        self.writes.append((self._at(self.backward[split]), held))
        self.reads.append((self._at(self.weight[split]), held))
        self.frees.append((self._at(self.weight[split]), held))

    def _away_and_back(
        self, buffers: Index, of: NDArray[np.bool_] | None = None
    ) -> Index:
        """Where what these buffers hold lies after a reload.

        Args:
            buffers: one for each forward, or for those of a mask.
            of: that mask.
        """
        away, back = self.away, self.back
        if of is not None:
            away, back = away[of], back[of]
        moved = away >= 0
        if not moved.any():
            return buffers
        away, back = self._at(away[moved]), self._at(back[moved])
        kind = np.concatenate(self.table)[buffers[moved], 0]
        there = self._elsewhere(buffers[moved])
        again = self._like(kind, buffers[moved])
        self.reads += [(away, buffers[moved]), (back, there)]
        self.frees += [(away, buffers[moved]), (back, there)]
        self.writes += [(away, there), (back, again)]
        held = buffers.copy()
        held[moved] = again
        return held

    def _elsewhere(self, buffers: Index) -> Index:
        """The copies of these on the host, or in another device's memory."""
        copies = self._like(BufferKind.HOST, buffers)
        rows = self.table[-1]
        targets = [-1 if d is None else d for d in self.schedule.offload_to]
        target = np.array(targets, dtype=np.int32)[rows[:, 1]]
        on_device = target >= 0
        rows[on_device, 0] = BufferKind.OFFLOADED
        rows[on_device, 1] = target[on_device]
        return copies

    def _like(self, kind: BufferKind | NDArray[np.int32], buffers: Index) -> Index:
        """A buffer of this kind for each of these, belonging to the same."""
        rows = np.concatenate(self.table)[buffers].copy()
        rows[:, 0], rows[:, 5] = kind, -1
        self.table.append(rows)
        self.count += len(rows)
        return np.arange(self.count - len(rows), self.count, dtype=np.int32)

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
        ]
        held = self._away_and_back(inputs)
        self.reads.append((self._at(self.last), held))
        self.frees.append((self._at(self.last), held))
        self.input_of_op = np.full(len(self.schedule), -1, dtype=np.int32)
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
        self.arrives = np.empty(len(hops.kind), dtype=np.int32)
        self.arrives[down] = self.input_of_op[hops.target_op[down]]
        self.arrives[~down] = gradient
        self.writes.append((layout.into, self.arrives))

    def _accumulators(self) -> None:
        """One gradient for each stage on each device that contributes or reduces."""
        reduces = np.flatnonzero(self.schedule.ops.kind == Kind.REDUCE)
        writers = np.concatenate([self.last, reduces])
        device = self.schedule.device_of_op[writers].astype(np.int64)
        key = device * self.schedule.stages + self.schedule.ops.stage[writers]
        _, example, number = np.unique(key, return_index=True, return_inverse=True)
        gradient = self._new(BufferKind.GRADIENT, writers[example])
        self.table[-1][:, 3:5] = -1, 0
        self.writes.append((self._at(writers), gradient[number]))
        self.reads.append((self._at(reduces), gradient[number[len(self.last) :]]))

    def reuse(self) -> Pairs:
        """Let arriving tensors take over the slots of freed ones, and wait for it.

        A slot belongs to one kind of tensor of one stage. Which slot is free is
        read off the canonical order; the one freed first is taken first.
        """
        table = np.concatenate(self.table)
        self.table = [table]
        freed_by = np.full(self.count, -1, dtype=np.int32)
        for instruction, buffer in self.frees:
            freed_by[buffer] = instruction
        remote = self.hops.remote
        arrives, recv = self.arrives[remote], self.layout.into[remote]
        kind = self.hops.kind[remote].astype(np.int64)
        key = kind * self.schedule.stages + table[arrives, 2]
        key = key * self.schedule.devices + table[arrives, 1]
        by_key = np.lexsort((recv, key))
        key = key[by_key]
        starts = 1 + np.flatnonzero(key[1:] != key[:-1])
        waiting: list[Index] = []
        for members in np.split(by_key, starts):
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
        buffers = np.concatenate([*waiting, np.empty(0, dtype=np.int32)])
        recv_of = np.full(self.count, -1, dtype=np.int32)
        recv_of[arrives] = recv
        return recv_of[buffers], freed_by[table[buffers, 5]]
