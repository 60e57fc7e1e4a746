"""Which forwards keep only their stage's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import BACKWARD_KINDS, Kind, Ops, Schedule, op

Policy = Literal["never", "always", "except-last", "adaptive"]
POLICIES: tuple[Policy, ...] = ("never", "always", "except-last", "adaptive")


def recompute(schedule: Schedule, policy: Policy | Sequence[Policy]) -> Schedule:
    """Choose which forwards keep only their stage's input (re-materialisation).

    A forward that has an R keeps only its input; the R rebuilds the activations
    right before the backward, and may start before the gradient arrives.

    * `never`: keep all activations.
    * `always`: an R before every backward. GPipe with m micro-batches then peaks
      at 1 micro-batch activation instead of m.
    * `except-last`: as torchgpipe, no R for the micro-batch that each stage
      forwards last.
    * `adaptive`: no R where a backward directly follows its own forward, so that
      nothing would be saved by one.

    What is OFFLOADed is kept too, if elsewhere: no policy adds an R for it.

    Last in, first out, GPipe's last forward on each device is directly followed
    by its own backward, so `adaptive` and `except-last` agree there and peak at
    1: the kept activations are gone before the first R rebuilds others. First
    in, first out, `except-last` keeps the last micro-batch's activations while
    each earlier one is rebuilt, and peaks at 2 (for m > 1); `adaptive` then
    rebuilds all, and peaks at 1. In 1F1B both spare something else: `adaptive`
    the whole last stage, whose backwards follow their forwards directly.

    Args:
        schedule: any; its own R, if it has some, give way.
        policy: one of the above, or one for each stage.

    Raises:
        ParameterError: an unknown policy, or policies for another number of stages.

    Source:
        Huang et al. 2018, arXiv:1811.06965, 2.3; Kim et al. 2020
        (torchgpipe), arXiv:2004.09910, for `except-last`.
    """
    of_stage = [policy] * schedule.stages if isinstance(policy, str) else list(policy)
    for name in of_stage:
        if name not in POLICIES:
            raise ParameterError(
                f"recompute policy must be one of {', '.join(POLICIES)}, got {name!r}"
            )
    if len(of_stage) != schedule.stages:
        raise ParameterError(
            f"{schedule.summary} runs {schedule.stages} stages, got {len(of_stage)} "
            "recompute policies: give one for all, or one for each"
        )
    plain = _without_recompute(schedule)
    if set(of_stage) == {"never"}:
        return plain
    plain.report.raise_if_bad()
    table = OpTable.of(plain)
    backward = table.get(*BACKWARD_KINDS)
    again = np.zeros(backward.shape, dtype=np.bool_)
    for name in set(of_stage):
        stages = [stage for stage, of in enumerate(of_stage) if of == name]
        again[..., stages] = _chosen(name, plain, table, backward)[..., stages]
    again[table.get(Kind.OFFLOAD) >= 0] = False
    return _insert(plain, np.sort(backward[again]))


def _chosen(
    policy: Policy, schedule: Schedule, table: OpTable, backward: Index
) -> NDArray[np.bool_]:
    """Where a policy wants an R."""
    again = np.full(backward.shape, policy != "never")
    if policy == "except-last":
        again[_last_forwarded(schedule, table)] = False
    elif policy == "adaptive":
        node = schedule.node_of_op
        follows = node[backward] == node[table.get(Kind.F)] + 1
        again[follows] = False
    return again


def _without_recompute(schedule: Schedule) -> Schedule:
    keep = schedule.ops.kind != Kind.R
    if keep.all():
        return schedule
    joined = schedule.ops.joined
    inside = (joined | np.append(joined[1:], False)) & ~keep
    if inside.any():
        device, step = schedule.locate(int(np.flatnonzero(inside)[0]))
        raise ParameterError(
            f"device {device}, step {step}: an R inside an overlap group cannot be "
            "replaced; take it out of the group first"
        )
    return schedule.with_rows(
        [
            schedule.row(device).take(keep[_span(schedule, device)])
            for device in range(schedule.devices)
        ]
    )


def _last_forwarded(schedule: Schedule, table: OpTable) -> tuple[Index, Index, Index]:
    """Of each stage, on each pipe, every slice of the micro-batch forwarded last."""
    forward = table.get(Kind.F)
    where: list[NDArray[np.int64]] = []
    for pipe in range(len(schedule.placement.pipes)):
        members = np.flatnonzero(schedule.pipe_of == pipe)
        if len(members):
            last = members[forward[members].max(axis=1).argmax(axis=0)]
            grid = np.stack(
                np.broadcast_arrays(
                    last[None, :],
                    np.arange(schedule.slices)[:, None],
                    np.arange(schedule.stages)[None, :],
                )
            )
            where.append(grid.reshape(3, -1))
    micro_batch, part, stage = np.concatenate(where, axis=1)
    return micro_batch, part, stage


def _insert(schedule: Schedule, backward: Index) -> Schedule:
    """An R ahead of each of these ops, or of the overlap group it is in."""
    first_of_node = np.flatnonzero(~schedule.ops.joined)
    place = first_of_node[schedule.node_of_op[backward]]
    ops = schedule.ops.take(backward)
    added = Ops.of([op(Kind.R, ops.stage, ops.micro_batch, ops.slice)])
    rows = []
    for device in range(schedule.devices):
        span = _span(schedule, device)
        mine = (place >= span.start) & (place < span.stop)
        columns = zip(schedule.row(device).columns(), added.take(mine).columns())
        at = place[mine] - span.start
        rows.append([Ops(*(np.insert(old, at, new) for old, new in columns))])
    return schedule.with_rows(rows)


def _span(schedule: Schedule, device: int) -> slice:
    return slice(int(schedule.row_starts[device]), int(schedule.row_starts[device + 1]))
