"""The buffers of a program, and which number each has.

Buffers are numbered in blocks, so that the number of any follows from what it
belongs to. In each block they stand in the order of micro-batch, slice and stage,
or of hops::

    activations | copies | weight stashes | copies | inputs | copies
                | outputs and input gradients, by hop
                | gradients of outputs, by hop
                | accumulated gradients, by device and stage
                | what arrived over skip connections, by hop | copies

The copies of a block are those elsewhere, then what comes back from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.hops import Hops
from pipeproof.sched.instructions import BufferKind
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.lists import Column
from pipeproof.sched.lists import table as new_table

_F = int(Kind.F)
_OUTPUT, _INPUT_GRAD = int(BufferKind.OUTPUT), int(BufferKind.INPUT_GRAD)
_OUTPUT_GRAD = int(BufferKind.OUTPUT_GRAD)
_INPUT, _STORED = int(BufferKind.INPUT), int(BufferKind.STORED_INPUT)

AGAIN, SPLIT, MOVED, HOWS = 1, 2, 4, 8


class Block(IntEnum):
    """The blocks, in their order."""

    KEPT = 0
    KEPT_AWAY = 1
    KEPT_BACK = 2
    STASH = 3
    STASH_AWAY = 4
    STASH_BACK = 5
    INPUT = 6
    INPUT_AWAY = 7
    INPUT_BACK = 8
    HANDED = 9
    OUTPUT_GRAD = 10
    GRADIENT = 11
    SKIP = 12
    SKIP_AWAY = 13
    SKIP_BACK = 14


_ARRIVED, _HANDED, _TO_COME = map(int, (Block.INPUT, Block.HANDED, Block.OUTPUT_GRAD))
_SKIP = int(Block.SKIP)


def how_of(table: OpTable) -> NDArray[np.int8]:
    """For each place which of AGAIN, SPLIT and MOVED it is."""
    how = np.zeros(int(np.prod(table.shape)), dtype=np.int8)
    for flag, kind in ((AGAIN, Kind.R), (SPLIT, Kind.W), (MOVED, Kind.OFFLOAD)):
        if kind in table.by_kind:
            how += table.has(kind).ravel() * np.int8(flag)
    return how


@dataclass(frozen=True)
class Blocks:
    """Which number each buffer has, and the table of them all.

    A place is a (micro-batch, slice, stage), as in `OpTable.place`.

    Attributes:
        starts: where each `Block` begins, and the end.
        rows: `Program.buffers`.
        skips: `Program.buffer_skips`.
        moved, split, moved_split: its number among those; -1 for others.
        moved_skip: of each buffer of SKIP, likewise.
        arrives: for each hop the buffer that it fills.
        accumulated: for each pipe and stage, its number among the accumulated
            gradients; -1 where there is none.
    """

    starts: NDArray[np.int64]
    rows: Column
    skips: Index
    moved: Index
    split: Index
    moved_split: Index
    moved_skip: Index
    arrives: Index
    accumulated: Index

    @classmethod
    def of(cls, schedule: Schedule, table: OpTable, hops: Hops, took: Index) -> Blocks:
        """Number the buffers, and say of each what it belongs to.

        Args:
            schedule: what is lowered.
            table: where its ops stand.
            hops: its tensors under way.
            took: for each hop the one whose slot it takes over, or -1.
        """
        away = table.get(Kind.OFFLOAD).ravel() >= 0
        split = table.get(Kind.W).ravel() >= 0
        places, moves = len(away), int(away.sum())
        splits, both = int(split.sum()), int((away & split).sum())
        devices, stages, accumulated = _accumulated(schedule)
        sizes = [places, moves, moves, splits, both, both, places, moves, moves]
        over = np.flatnonzero(hops.skip >= 0)
        over = hops.target[over[schedule.ops.kind[hops.source[over]] == _F]]
        skip_away = away[table.place[over]]
        sizes += [len(hops.source), len(hops.source) // 2, len(stages)]
        sizes += [len(over), *[int(skip_away.sum())] * 2]
        starts = np.cumsum([0, *sizes])
        rows = new_table(int(starts[-1]), 6)
        blocks = [rows[a:b] for a, b in pairwise(starts.tolist())]
        activations, stashes = blocks[Block.KEPT], blocks[Block.STASH]
        inputs, gradients = blocks[Block.INPUT], blocks[Block.GRADIENT]
        again = table.get(Kind.R).ravel() >= 0
        _of_places(schedule, table, activations, BufferKind.ACTIVATION)
        _of_places(schedule, table, inputs, BufferKind.INPUT)
        inputs[again, 0] = BufferKind.STORED_INPUT
        stashes[:] = activations[split]
        stashes[:, 0] = BufferKind.WEIGHT_STASH
        skips = np.full(len(rows) if len(over) else 0, -1, dtype=np.int32)
        arrives = _of_hops(schedule, table, hops, starts, rows, skips)
        if moves:
            for block, which in (
                (Block.KEPT, away),
                (Block.STASH, away[split]),
                (Block.INPUT, away),
                (Block.SKIP, skip_away),
            ):
                _copies(schedule, blocks[block][which], *blocks[block + 1 : block + 3])
        if skip_away.any():
            parts = np.split(skips, starts[1:-1])
            for copies in (Block.SKIP_AWAY, Block.SKIP_BACK):
                parts[copies][:] = parts[Block.SKIP][skip_away]
        for column, values in zip(
            gradients.T, (BufferKind.GRADIENT, devices, stages, -1, 0, -1)
        ):
            column[:] = values
        taken = np.flatnonzero(took >= 0)
        rows[arrives[taken], 5] = arrives[took[taken]]
        numbers = _numbers(away), _numbers(split), _numbers(away & split)
        moved = *numbers, _numbers(skip_away)
        return cls(starts, rows, skips, *moved, arrives, accumulated)


def _numbers(chosen: NDArray[np.bool_]) -> Index:
    """0, 1, 2, … for those chosen, -1 for the others."""
    result = np.full(len(chosen), -1, dtype=np.int32)
    result[chosen] = np.arange(int(chosen.sum()), dtype=np.int32)
    return result


def _accumulated(schedule: Schedule) -> tuple[Index, Index, Index]:
    """Device and stage of each accumulated gradient, and where each is.

    There is one for each stage on each device that contributes or reduces.
    """
    ops, stages = schedule.ops, schedule.stages
    homes = np.array(schedule.placement.pipes, dtype=np.int64)
    keys = homes * stages + np.arange(stages)
    reduces = np.flatnonzero(ops.kind == Kind.REDUCE)
    reduced = schedule.device_of_op[reduces].astype(np.int64) * stages
    used = keys[np.unique(schedule.pipe_of)].ravel()
    pairs = np.unique(np.concatenate([used, reduced + ops.stage[reduces]]))
    number = np.searchsorted(pairs, keys).clip(max=len(pairs) - 1)
    there = pairs[number] == keys
    return pairs // stages, pairs % stages, np.where(there, number, -1).astype(np.int32)


def _of_places(schedule: Schedule, table: OpTable, rows: Column, kind: Any) -> None:
    """A buffer for each place, on the device of its forward."""
    micro_batches, slices, stages = table.shape
    homes = np.array(schedule.placement.pipes, dtype=np.int32)
    values = (
        kind,
        homes[schedule.pipe_of][:, None, :],
        np.arange(stages),
        np.arange(micro_batches)[:, None, None],
        np.arange(slices)[:, None],
        -1,
    )
    for column, numbers in zip(rows.T, values):
        column.reshape(table.shape)[:] = numbers


def _copies(schedule: Schedule, moved: Column, away: Column, back: Column) -> None:
    """Of each moved buffer a copy on the host or another device, and one back."""
    away[:] = back[:] = moved
    away[:, 0] = BufferKind.HOST
    targets = [-1 if d is None else d for d in schedule.offload_to]
    target = np.array(targets, dtype=np.int32)[moved[:, 1]]
    on_device = target >= 0
    away[on_device, 0] = BufferKind.OFFLOADED
    away[on_device, 1] = target[on_device]


def _of_hops(
    schedule: Schedule,
    table: OpTable,
    hops: Hops,
    starts: NDArray[np.int64],
    rows: Column,
    skips: Index,
) -> Index:
    """What each hop hands on, and the gradients of outputs that arrive.

    Returns:
        For each hop the buffer that it fills, the consumer's input or the gradient
        of its output.
    """
    ops = schedule.ops
    columns = [
        hops.source,
        hops.target,
        ops.kind,
        ops.stage,
        ops.micro_batch,
        ops.slice,
        table.place,
        schedule.device_of_op,
        starts,
        hops.skip,
        table.get(Kind.R).ravel(),
        *rows.T,
        skips,
        np.empty(len(hops.source), dtype=np.int32),
    ]
    return run(_fill, columns, results=[*range(11, 19)], size=len(hops.source))[-1]


def _fill(
    source: Any,
    target: Any,
    op_kind: Any,
    op_stage: Any,
    op_micro_batch: Any,
    op_slice: Any,
    place: Any,
    op_device: Any,
    starts: Any,
    skip_of: Any,
    again: Any,
    kind: Any,
    device: Any,
    stage: Any,
    micro_batch: Any,
    part: Any,
    takes_over: Any,
    skips: Any,
    arrives: Any,
) -> None:
    gradient = starts[_TO_COME]
    over = starts[_SKIP]
    for hop in range(len(source)):
        down = op_kind[source[hop]] == _F
        for side in range(1 if down else 2):
            row = gradient if side else starts[_HANDED] + hop
            op = target[hop] if side else source[hop]
            kind[row] = _OUTPUT_GRAD if side else _OUTPUT if down else _INPUT_GRAD
            device[row] = op_device[op]
            stage[row] = op_stage[op]
            micro_batch[row] = op_micro_batch[op]
            part[row] = op_slice[op]
            takes_over[row] = -1
        if not down:
            arrives[hop] = gradient
            gradient += 1
        elif len(skip_of) == 0 or skip_of[hop] < 0:
            arrives[hop] = starts[_ARRIVED] + place[target[hop]]
        else:
            op = target[hop]
            kind[over] = _STORED if again[place[op]] >= 0 else _INPUT
            device[over] = op_device[op]
            stage[over] = op_stage[op]
            micro_batch[over] = op_micro_batch[op]
            part[over] = op_slice[op]
            takes_over[over] = -1
            arrives[hop] = over
            over += 1
        if len(skip_of) > 0 and skip_of[hop] >= 0:
            skips[starts[_HANDED] + hop] = skips[arrives[hop]] = skip_of[hop]
