"""Who writes, reads and frees which buffer.

What an op does to buffers follows from its kind, and from whether its activations
are recomputed, its backward split, its activations moved elsewhere: `TOUCHES` says it
in blocks of buffers (see `pipeproof.sched.buffers`), and all else reads it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.buffers import AGAIN, HOWS, MOVED, SPLIT, Block, Blocks, how_of
from pipeproof.sched.deps import OpTable
from pipeproof.sched.hops import Hops
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run
from pipeproof.sched.layout import Layout
from pipeproof.sched.lists import Lists


class Touch(IntEnum):
    """What an op does to a buffer."""

    WRITE = 0
    ADD = 1
    """Write to what has been written before."""
    READ = 2
    TAKE = 3
    """Read it for the last time, and free it."""


def _touches(kind: Kind, how: int, skips: bool) -> list[tuple[Touch, Block]]:
    again, split, moved = how & AGAIN, how & SPLIT, how & MOVED
    kept, stash = [Block.KEPT, Block.STASH][: 2 if split else 1], [Block.STASH]
    inputs, over = [Block.INPUT], [Block.SKIP] if skips else []
    if moved and kind not in (Kind.F, Kind.R, Kind.OFFLOAD):  # it came back
        kept, stash, inputs = [Block.KEPT_BACK], [Block.STASH_BACK], [Block.INPUT_BACK]
        over = [Block.SKIP_BACK] if skips else []
    inputs += over
    writes: list[Block] = []
    adds: list[Block] = []
    reads: list[Block] = []
    takes: list[Block] = []
    match kind:
        case Kind.F:
            writes = [*([] if again else kept), Block.INPUT, Block.HANDED]
            reads = inputs
        case Kind.R:
            writes, reads = kept, inputs
        case Kind.B:
            writes = [Block.HANDED, Block.GRADIENT]
            takes = [kept[0], *inputs, Block.OUTPUT_GRAD]
        case Kind.I:
            adds, writes = stash, [Block.HANDED]
            takes = [kept[0], Block.OUTPUT_GRAD]
        case Kind.W:
            writes, takes = [Block.GRADIENT], [*stash, *inputs]
        case Kind.OFFLOAD:
            takes = [*kept, Block.INPUT, *over]
            writes = [Block(block + 1) for block in takes]
        case Kind.RELOAD:
            takes = [Block.KEPT_AWAY, Block.INPUT_AWAY]
            if split:
                takes.insert(1, Block.STASH_AWAY)
            takes += [Block.SKIP_AWAY] if skips else []
            writes = [Block(block + 1) for block in takes]
        case Kind.REDUCE:
            writes = reads = [Block.GRADIENT]
        case Kind.STEP:
            reads = [Block.GRADIENT]
    return [
        *((Touch.WRITE, block) for block in writes),
        *((Touch.ADD, block) for block in adds),
        *((Touch.READ, block) for block in reads),
        *((Touch.TAKE, block) for block in takes),
    ]


TOUCHES = [_touches(kind, how, False) for kind in Kind for how in range(HOWS)]
"""What an op does, at kind × HOWS + how (see `how_of`).

A forward writes its input where it brings it in, and reads it where it arrives.
What is handed on, and gradients of outputs, are only there between stages.
"""


def touching(touch: Touch, block: Block) -> NDArray[np.bool_]:
    """Which ops do this to a buffer of this block, at kind × HOWS + how."""
    return np.array(_touching(touch, block))


@cache
def _touching(touch: Touch, block: Block) -> list[bool]:
    return [(touch, block) in some for some in TOUCHES]


@cache
def _tables(skips: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Where what each does begins, the verbs, and the blocks."""
    every = [_touches(kind, how, skips) for kind in Kind for how in range(HOWS)]
    verbs, blocks = np.array([pair for some in every for pair in some]).T
    return np.array([0, *accumulate(map(len, every))]), verbs, blocks


_WRITE, _ADD, _TAKE = map(int, (Touch.WRITE, Touch.ADD, Touch.TAKE))
_F, _REDUCE = int(Kind.F), int(Kind.REDUCE)
_SEND, _RECV = int(Action.SEND), int(Action.RECV)
_KEPT, _STASH = int(Block.KEPT), int(Block.STASH)
_INPUT, _HANDED = int(Block.INPUT), int(Block.HANDED)
_OUTPUT_GRAD, _GRADIENT = int(Block.OUTPUT_GRAD), int(Block.GRADIENT)
_SKIP = int(Block.SKIP)


@dataclass(frozen=True)
class Touched:
    """The buffers that each instruction writes, reads and frees."""

    writes: Lists
    reads: Lists
    frees: Lists

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        table: OpTable,
        hops: Hops,
        layout: Layout,
        blocks: Blocks,
    ) -> Touched:
        """Of a group, op by op."""
        ops, total = schedule.ops, len(layout.action)
        homes = np.array(schedule.placement.pipes, dtype=np.int32)
        # A skip's tensor is read wherever a stage's input is.
        most = 4 * len(ops) + len(hops.source) + 4 * len(hops.skip)
        index: Any = np.int32 if most < 2**31 else np.int64
        columns: list[NDArray[Any]] = [
            layout.action,
            layout.first_op,
            layout.op_count,
            layout.hop,
            ops.kind,
            ops.stage,
            ops.micro_batch,
            table.place,
            schedule.device_of_op,
            schedule.pipe_of,
            homes,
            blocks.accumulated,
            how_of(table),
            blocks.moved,
            blocks.split,
            blocks.moved_split,
            blocks.moved_skip,
            blocks.starts,
            hops.out_of,
            hops.into,
            hops.source,
            hops.beside,
            table.get(Kind.F).ravel(),
            blocks.arrives,
            *_tables(len(hops.skip) > 0),
            *(np.zeros(total + 1, dtype=index) for _ in range(3)),
            *(np.empty(most, dtype=np.int32) for _ in range(3)),
        ]
        found = run(_touch, columns, results=[*range(27, 33)], size=total)
        return cls(
            *(Lists(at, some[: at[-1]]) for at, some in zip(found[:3], found[3:]))
        )


def _touch(
    action: Any,
    first_op: Any,
    op_count: Any,
    hop_of: Any,
    kind: Any,
    stage: Any,
    micro_batch: Any,
    place: Any,
    device: Any,
    pipe_of: Any,
    homes: Any,
    accumulated: Any,
    how: Any,
    moved: Any,
    split: Any,
    moved_split: Any,
    moved_skip: Any,
    starts: Any,
    out_of: Any,
    into: Any,
    source: Any,
    beside: Any,
    forward: Any,
    arrives: Any,
    rows: Any,
    verbs: Any,
    blocks: Any,
    writes_at: Any,
    reads_at: Any,
    frees_at: Any,
    writes: Any,
    reads: Any,
    frees: Any,
) -> None:
    w = 0
    r = 0
    f = 0
    for i in range(len(action)):
        hop = hop_of[i]
        if hop >= 0:  # a tensor handed on
            if action[i] != _RECV:
                reads[r] = frees[f] = starts[_HANDED] + hop
                r += 1
                f += 1
            if action[i] != _SEND:
                writes[w] = arrives[hop]
                w += 1
        begin = first_op[i]
        for op in range(begin, begin + op_count[i]):
            what, at = kind[op], place[op]
            row = what * HOWS
            if what < _REDUCE:  # ops of a stage have no place
                row += how[at]
            for nth in range(rows[row], rows[row + 1]):
                verb, block = verbs[nth], blocks[nth]
                buffer = -1
                if block == _HANDED:
                    hop = out_of[op]
                    while 0 <= hop < len(source) and source[hop] == op:
                        writes[w] = starts[block] + hop
                        w += 1
                        hop += 1
                elif block == _OUTPUT_GRAD or block >= _SKIP:
                    hop = into[op]
                    if block >= _SKIP:  # what came beside the input of its forward
                        hop = into[forward[at]]
                        if hop >= 0:
                            hop = beside[hop]
                    while hop >= 0:
                        buffer = arrives[hop]
                        if block > _SKIP:
                            buffer = starts[block] + moved_skip[buffer - starts[_SKIP]]
                        if verb == _WRITE:
                            writes[w] = buffer
                            w += 1
                        else:
                            reads[r] = buffer
                            r += 1
                            if verb == _TAKE:
                                frees[f] = buffer
                                f += 1
                        hop = beside[hop] if len(beside) > 0 else -1
                    buffer = -1
                elif block == _GRADIENT:
                    pipe = 0
                    if what < _REDUCE:
                        pipe = pipe_of[micro_batch[op]]
                    else:  # of the stage that lies here
                        while homes[pipe][stage[op]] != device[op]:
                            pipe += 1
                    buffer = starts[block] + accumulated[pipe][stage[op]]
                elif block in (_KEPT, _INPUT):
                    arrived = into[op] >= 0
                    if block == _INPUT and what == _F and arrived == (verb == _WRITE):
                        continue
                    buffer = starts[block] + at
                elif block == _STASH:
                    buffer = starts[block] + split[at]
                elif _STASH < block < _INPUT:
                    buffer = starts[block] + moved_split[at]
                else:
                    buffer = starts[block] + moved[at]
                if buffer < 0:
                    continue
                if verb in (_WRITE, _ADD):
                    writes[w] = buffer
                    w += 1
                    continue
                reads[r] = buffer
                r += 1
                if verb == _TAKE:
                    frees[f] = buffer
                    f += 1
        writes_at[i + 1] = w
        reads_at[i + 1] = r
        frees_at[i + 1] = f
