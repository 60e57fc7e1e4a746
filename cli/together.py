"""The most that an ActivationMeter counts where one process runs all devices.

It runs a program's instructions one after the other, whatever they take. An I that its
W follows at once is run as one with it. And what a stage returns and keeps as well, as
a ReLU does, is the very memory that the next one is called with, and counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Action, BufferKind, Kind, Program, Trace
from pipeproof.sched.memory import lifetimes
from pipeproof.sim import Cost

Index = NDArray[np.int64]

COUNTED = ("activations", "weight_grad_stash", "stored_inputs")
"""Classes of bytes that an ActivationMeter counts."""

KEPT = (BufferKind.ACTIVATION, BufferKind.WEIGHT_STASH)
INPUTS = (BufferKind.INPUT, BufferKind.STORED_INPUT)


def peaks_of(trace: Trace, *, shared: bool) -> list[int]:
    """Most bytes that a meter would count, of each device, or of all together."""
    devices = [None] if shared else range(trace.program.schedule.devices)
    result = []
    for device in devices:
        by_class = trace.memory(device).by_class
        counted = np.sum([by_class[name] for name in COUNTED], axis=0)
        result.append(int(counted.max()))
    return result


def peak_of_process(program: Program, cost: Cost, returned: Sequence[float]) -> int:
    """Most bytes that a meter would count in a process that runs it all.

    Args:
        program: lowered as a Pipeline of one process does.
        cost: bytes of its stages.
        returned: of each stage, the bytes of its output that it keeps.
    """
    weight = cost.sizes(program).known_bytes().astype(float)
    comes, goes = _lives(program)
    counted = np.isin(program.buffers[:, 0], (*KEPT, *INPUTS))
    kept, entry = _alike(program)
    before = program.buffers[kept, 2]
    twice = np.array(returned, dtype=float)[before] / program.schedule.slices
    begin = np.maximum(comes[kept], comes[entry])
    end = np.maximum(np.minimum(goes[kept], goes[entry]), begin)
    # At one time in this order, so that nothing counts twice in between.
    times = np.concatenate([begin, comes[counted], goes[counted], end])
    changes = np.concatenate([-twice, weight[counted], -weight[counted], twice])
    order = np.argsort(times, kind="stable")
    return round(float(np.cumsum(changes[order]).max(initial=0)))


def _lives(program: Program) -> tuple[Index, Index]:
    """When each buffer begins to count, and when it is gone.

    An instruction i begins at 4i and ends at 4i + 3; a W that is run as one with its I
    within that.
    """
    born, died = lifetimes(program)
    reads = program.reads
    reader = np.full(len(program.buffers), len(program), dtype=np.int64)
    reader[reads.values[::-1]] = reads.owner[::-1]  # the first
    arrived = np.isin(program.action[born], (Action.RECV, Action.LOCAL))
    end = 4 * np.arange(len(program)) + 3
    ops = program.schedule.ops
    for members in program.by_stream:
        for before, index in pairwise(members.tolist()):
            if program.op_count[before] != 1 or program.op_count[index] != 1:
                continue
            first, second = (ops[int(program.first_op[n])] for n in (before, index))
            if first.kind == Kind.I and second == first._replace(kind=Kind.W):
                end[index] = 4 * before + 2
    return 4 * np.where(arrived, reader, born), end[died]


def _alike(program: Program) -> tuple[Index, Index]:
    """What forwards keep, and the inputs of the next stage that are part of that."""
    kind, skips = program.buffers[:, 0], program.buffer_skips
    own = skips < 0 if len(skips) else np.ones(len(kind), dtype=np.bool_)
    again = program.schedule.table.has(Kind.R)
    owners = list(map(tuple, program.buffers[:, 2:5].tolist()))
    kept = {
        owners[buffer]: buffer
        for buffer in np.flatnonzero(kind == BufferKind.ACTIVATION).tolist()
    }
    pairs = []
    for entry in np.flatnonzero(np.isin(kind, INPUTS) & own).tolist():
        stage, micro_batch, part = owners[entry]
        if stage and not again[micro_batch, part, stage - 1]:
            pairs.append((kept[stage - 1, micro_batch, part], entry))
    before, after = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return before, after
