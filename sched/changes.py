"""What comes and goes with an op, in micro-batches of its device's share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.buffers import AGAIN, HOWS, SPLIT, Block, how_of
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.touches import Touch, touching


def cells_of(schedule: Schedule) -> int:
    """Stages of all pipes."""
    return len(schedule.placement.pipes) * schedule.stages


def rows_of(schedule: Schedule) -> NDArray[np.int32]:
    """For each op where `changes` has it."""
    table = schedule.table
    columns: list[NDArray[Any]] = [
        schedule.ops.kind,
        table.place,
        table.cell,
        how_of(table),
        np.array([cells_of(schedule)]),
        np.empty(len(schedule), dtype=np.int32),
    ]
    return run(_number, columns, results=[5], size=len(schedule))[0]


def _number(kind: Any, place: Any, cell: Any, how: Any, cells: Any, row: Any) -> None:
    for op in range(len(kind)):
        row[op] = (kind[op] * HOWS + how[place[op]]) * cells[0] + cell[op]


HERE = ((Block.KEPT, Block.KEPT_BACK), (Block.STASH, Block.STASH_BACK))
"""Activations and weight stashes on the device of their ops."""

AWAY = ((Block.KEPT_AWAY,), (Block.STASH_AWAY,))
"""Their copies elsewhere."""


def changes(
    touch: Touch, numbers: NDArray[np.int64], where: tuple[tuple[Block, ...], ...]
) -> NDArray[np.int64]:
    """What comes or goes with an op, at (kind × HOWS + how) × cells + its stage's."""
    how = np.arange(len(Kind) * HOWS) % HOWS
    column = (how & AGAIN > 0) + 2 * (how & SPLIT > 0)
    result = np.zeros((len(how), numbers.size // 8), dtype=np.int64)
    for blocks, each in zip(where, numbers.reshape(2, 4, -1)):
        for block in blocks:
            result += touching(touch, block)[:, None] * each[column]
    return result.ravel()
