"""One look at each op that finds most schedules clean, and levels them.

`check` says in many passes over columns what is wrong, rule by rule. Most schedules
are right, and of those one pass can tell so and find their levels; where it is not
sure it says nothing, and the rules and `deps.order` are asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import skips, ties
from pipeproof.sched.ir import Kind, Schedule
from pipeproof.sched.kernels import run

OF_MICRO_BATCHES = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.OFFLOAD, Kind.RELOAD)
"""The kinds with a table."""

_F, _B, _I, _W, _R, _OFFLOAD, _RELOAD = map(int, OF_MICRO_BATCHES)
_REDUCE = int(Kind.REDUCE)


def clean_levels(schedule: Schedule) -> NDArray[np.int32] | None:
    """The levels of a schedule without findings; None if there may be some.

    Returns:
        int32 per lone op or overlap group, as `deps.Order.level`. None for schedules
        with STEPs behind sums over devices too.
    """
    ops = schedule.ops
    shape = schedule.all_micro_batches, schedule.slices, schedule.stages
    if not len(ops) or _impossible(schedule):
        return None
    homes = np.array(schedule.placement.pipes, dtype=np.int32)
    sums = len(homes) > 1 or schedule.has(Kind.REDUCE)
    steps = schedule.has(Kind.STEP)
    if steps and (sums or schedule.ties):
        return None
    numbers = ops.micro_batch, ops.slice, ops.stage
    if any(column.max() >= size for column, size in zip(numbers, shape)):
        return None
    if len(ops) < 2 * int(np.prod(shape, dtype=object)):
        return None
    table = schedule.table
    if Kind.F not in table.by_kind:
        return None
    empty = np.zeros(0, dtype=np.int32)
    of_steps = schedule.steps * homes.size
    grouped = bool(ops.joined.any())
    columns: list[NDArray[Any]] = [
        ops.kind,
        ops.stage,
        ops.slice,
        ops.micro_batch,
        ops.joined,
        table.place,
        schedule.pipe_of,
        schedule.row_starts,
        homes.ravel(),
        np.array([*shape, len(homes), schedule.micro_batches, sums, steps, grouped]),
        *(
            table.by_kind[kind].ravel() if kind in table.by_kind else empty
            for kind in OF_MICRO_BATCHES
        ),
        np.full(schedule.devices, -1, dtype=np.int32),
        np.array(schedule.row_starts[:-1]),
        np.empty(schedule.devices, dtype=np.int32),
        np.full((schedule.devices, 3), -1, dtype=np.int32).ravel(),
        *(np.full(of_steps, -1, dtype=np.int32) for _ in range(3)),
        np.full(len(ops), -1, dtype=np.int32),
        np.zeros(1, dtype=np.int64),
    ]
    level, done = run(_advance, columns, results=[24, 25], size=len(ops))
    if done[0] != len(ops):
        return None
    return level[~ops.joined] if grouped else level


def _impossible(schedule: Schedule) -> bool:
    """Whether skips, ties or targets of copies are wrong."""
    for device, target in enumerate(schedule.offload_to):
        if target is not None and (target >= schedule.devices or target == device):
            return True
    if schedule.skips and skips.wrong(schedule):
        return True
    return bool(schedule.ties and ties.wrong(schedule))


def _advance(
    kind: Any,
    stage: Any,
    part: Any,
    micro_batch: Any,
    joined: Any,
    place: Any,
    pipe_of: Any,
    row_starts: Any,
    home: Any,
    shape: Any,
    forward: Any,
    whole: Any,
    half: Any,
    weight: Any,
    again: Any,
    away: Any,
    back: Any,
    behind: Any,
    at: Any,
    ready: Any,
    streams: Any,
    reduced: Any,
    last: Any,
    reached_by: Any,
    level: Any,
    done: Any,
) -> None:
    """Each device runs its row until an op needs one that has not run.

    It then waits at that one, whose level so long is -2 - device, in a chain with
    the others that do. Whoever runs the op makes them ready again. A REDUCE, which
    nothing waits for, is passed by and levelled in the end.
    """
    slices, stages, pipes, of_step = shape[1], shape[2], shape[3], shape[4]
    sums, steps, grouped = shape[5] > 0, shape[6] > 0, shape[7] > 0
    # F, and either B or I and W, of each stage, micro-batch and slice.
    for cell in range(len(forward)):
        one = len(whole) > 0 and whole[cell] >= 0
        two = len(half) > 0 and half[cell] >= 0
        three = len(weight) > 0 and weight[cell] >= 0
        if forward[cell] < 0 or one == two or two != three:
            return
    for cell in range(len(away)):
        if len(back) == 0 or (away[cell] >= 0) != (back[cell] >= 0):
            return
    if len(back) > len(away):
        return
    count = len(at)
    for device in range(count):
        ready[device] = device
    ran = 0
    while count > 0:
        count -= 1
        device = ready[count]
        while at[device] < row_starts[device + 1]:
            begin = at[device]
            end = begin + 1
            while grouped and end < row_starts[device + 1] and joined[end]:
                end += 1
            reached = streams[3 * device]
            missing = -1
            for op in range(begin, end):
                cell, what = place[op], kind[op]
                if end > begin + 1 and what > _R:
                    return
                if what >= _REDUCE:
                    break
                own = first = second = third = fourth = -1
                if what == _F:
                    own = forward[cell]
                    if stage[op] > 0:
                        first = forward[cell - 1]
                    if part[op] > 0:
                        second = forward[cell - stages]
                elif what in (_B, _I):
                    own = whole[cell] if what == _B else half[cell]
                    first = forward[cell]
                    if len(again) > 0 and again[cell] >= 0:
                        first = again[cell]
                    if stage[op] < stages - 1:
                        second = whole[cell + 1] if len(whole) > 0 else -1
                        if second < 0:
                            second = half[cell + 1]
                    if part[op] < slices - 1:
                        third = whole[cell + stages] if len(whole) > 0 else -1
                        if third < 0:
                            third = half[cell + stages]
                    if len(back) > 0:
                        fourth = back[cell]
                elif what == _W:
                    own = weight[cell]
                    first = half[cell]
                elif what == _R:
                    own = again[cell]
                    first = forward[cell]
                elif what == _OFFLOAD:
                    own = away[cell]
                    first = forward[cell]
                    reached = max(reached, streams[3 * device + 1])
                else:
                    own = back[cell]
                    first = away[cell]
                    reached = max(reached, streams[3 * device + 2])
                for need in (first, second, third, fourth):
                    if need >= 0:
                        if level[need] < 0:
                            missing = need
                            break
                        reached = max(reached, level[need])
                if missing >= 0:
                    break
                pipe = pipe_of[micro_batch[op]] if pipes > 1 else 0
                if own != op or home[pipe * stages + stage[op]] != device:
                    return
            if missing >= 0:
                behind[device] = -2 - level[missing]
                level[missing] = -2 - device
                break
            at[device] = end
            ran += end - begin
            what = kind[begin]
            if what >= _REDUCE:
                step = micro_batch[begin]
                if (step + 1) * of_step > shape[0]:
                    return
                there = False
                for pipe in range(pipes):
                    cell = (step * pipes + pipe) * stages + stage[begin]
                    if home[pipe * stages + stage[begin]] == device:
                        if reduced[cell] >= 0:
                            return
                        reduced[cell] = begin
                        there = True
                if not there:
                    return
            if what == _REDUCE:
                level[begin] = reached
                continue
            reached += 1
            for op in range(begin, end):
                waiting = -2 - level[op]
                while waiting >= 0:
                    ready[count] = waiting
                    count += 1
                    waiting = behind[waiting]
                level[op] = reached
                if (sums or steps) and kind[op] in (_B, _W):
                    step = micro_batch[op] // of_step
                    pipe = pipe_of[micro_batch[op]]
                    cell = (step * pipes + pipe) * stages + stage[op]
                    last[cell] = op
                    reached_by[cell] = max(reached_by[cell], reached)
            if what == _OFFLOAD:
                streams[3 * device + 1] = reached
            elif what == _RELOAD:
                streams[3 * device + 2] = reached
            else:
                streams[3 * device] = reached
    # STEPs: one of each stage, behind its last.
    for cell in range(len(reduced) if steps else 0):
        if reduced[cell] < 0 or last[cell] > reduced[cell]:
            return
    # REDUCEs: one on each device of a stage with replicas, behind its last there.
    for cell in range(len(reduced) if sums else 0):
        op = reduced[cell]
        here = home[cell % (pipes * stages)]
        first = cell - cell // stages % pipes * stages
        reached = -1
        seen = False  # with another pipe of the device
        for other in range(first, first + pipes * stages, stages):
            if home[other % (pipes * stages)] != here:
                if op < 0:
                    return
            elif op >= 0 and last[other] > op:
                return
            elif other < cell:
                seen = True
            reached = max(reached, reached_by[other])
        if op >= 0 and not seen:
            level[op] = max(level[op], reached) + 1
    done[0] = ran
