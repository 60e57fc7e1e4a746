"""The form of the backward, and its order."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.deps import Index, OpTable
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.ir import BACKWARD_KINDS, STAGE_KINDS, Kind, Ops, Schedule

BackwardOrder = Literal["lifo", "fifo"]


def split_backward(schedule: Schedule) -> Schedule:
    """Every B as its two halves, I and right behind it W.

    A start for schedules that move W away from I: `retime` does, by time. The
    gradient goes on to the stage before it as soon as I is done.

    Args:
        schedule: any; its own I and W stay as they are.

    Raises:
        ParameterError: a B inside an overlap group: its W needs its I, so both
            cannot stand in the group, and which of them should is not ours to
            say.
    """
    ops = schedule.ops
    whole: NDArray[np.bool_] = ops.kind == Kind.B
    if not whole.any():
        return schedule
    _refuse_grouped(schedule, whole, "split")
    kind = ops.kind.copy()
    kind[whole] = Kind.I
    at = np.flatnonzero(whole)
    columns: list[NDArray[Any]] = [kind, *ops.columns()[1:]]
    added = [column[at] for column in columns]
    added[0] = np.full(len(at), Kind.W, dtype=np.int8)
    halves = Ops(*(np.insert(c, at + 1, new) for c, new in zip(columns, added)))
    grown = np.concatenate([[0], np.cumsum(whole)])[schedule.row_starts]
    return _of_rows(schedule, halves, schedule.row_starts + grown)


def merge_backward(schedule: Schedule) -> Schedule:
    """Each I with its own W right behind it as one B; others are left as they are.

    So `merge_backward(split_backward(s)) == s` for every s without such a pair of
    its own. One kernel launch instead of two, at the price that the stage before
    waits for W too. An I or W inside an overlap group is never merged.

    Args:
        schedule: any.
    """
    ops = schedule.ops
    first, second = slice(None, -1), slice(1, None)
    pair = (ops.kind[first] == Kind.I) & (ops.kind[second] == Kind.W)
    for column in (ops.stage, ops.micro_batch, ops.slice, schedule.device_of_op):
        pair &= column[first] == column[second]
    grouped = _grouped(ops)
    pair &= ~grouped[first] & ~grouped[second]
    if not pair.any():
        return schedule
    kind = ops.kind.copy()
    kind[first][pair] = Kind.B
    keep = np.append(True, ~pair)
    merged = Ops(*(column[keep] for column in (kind, *ops.columns()[1:])))
    gone = np.concatenate([[0], np.cumsum(~keep)])[schedule.row_starts]
    return _of_rows(schedule, merged, schedule.row_starts - gone)


def reorder_backward(schedule: Schedule, order: BackwardOrder) -> Schedule:
    """Let the backwards of a fill-drain schedule come in another order.

    Fill-drain: on each device all forwards come first. Then the backwards can go
    through the micro-batches in any order, as long as it is one order for all
    stages, and each keeps its place but for the micro-batch it is about.

    Args:
        schedule: of one step, whose stages forward in one order of micro-batches
            and go backward in one order; GPipe and looped breadth-first are.
        order: `lifo`, the micro-batch forwarded last first, as GPipe published
            it; or `fifo`, in the order of the forwards, which frees first what
            waited longest.

    Raises:
        ParameterError: another order, a backward ahead of a forward on its
            device, stages of different orders, or R or OFFLOAD, which are to be
            chosen for the order, not before it.
        ScheduleError: `check` has findings.
    """
    if order not in ("lifo", "fifo"):
        raise ParameterError(f"order must be 'lifo' or 'fifo', got {order!r}")
    schedule.report.raise_if_bad()
    _fill_drain(schedule)
    table = OpTable.of(schedule)
    forward = table.get(Kind.F).min(axis=1)
    backward = table.get(*BACKWARD_KINDS).min(axis=1)
    becomes = np.arange(schedule.all_micro_batches)
    for pipe in range(len(schedule.placement.pipes)):
        members = np.flatnonzero(schedule.pipe_of == pipe)
        if len(members):
            wanted = members[_one_order(forward[members], "forward")]
            now = members[_one_order(backward[members], "go backward")]
            becomes[now] = wanted[::-1] if order == "lifo" else wanted
    ops = schedule.ops
    renumbered = ops.micro_batch.copy()
    moved = np.isin(ops.kind, [Kind.B, Kind.I, Kind.W])
    renumbered[moved] = becomes[ops.micro_batch[moved]]
    changed = Ops(ops.kind, ops.stage, renumbered, ops.slice, ops.joined)
    return _of_rows(schedule, changed, schedule.row_starts)


def _fill_drain(schedule: Schedule) -> None:
    kind = schedule.ops.kind
    if schedule.steps > 1:
        raise ParameterError(
            f"reorder_backward takes a schedule of one step, got {schedule.steps}"
        )
    for other in (Kind.R, Kind.OFFLOAD, Kind.RELOAD):
        if schedule.has(other):
            raise ParameterError(
                f"reorder_backward: take {other.name} out, reorder, and choose it anew"
            )
    for device in range(schedule.devices):
        row = slice(*schedule.row_starts[device : device + 2].tolist())
        forwards = np.flatnonzero(kind[row] == Kind.F)
        others = np.flatnonzero(
            (kind[row] != Kind.F) & ~np.isin(kind[row], list(STAGE_KINDS))
        )
        if len(forwards) and len(others) and others[0] < forwards[-1]:
            early = schedule.ops[row.start + int(others[0])]
            late = schedule.ops[row.start + int(forwards[-1])]
            raise ParameterError(
                f"device {device}, step {others[0]}: reorder_backward takes schedules "
                f"with all forwards first, found {early} ahead of {late}"
            )


def _one_order(place: Index, what: str) -> Index:
    """The order of the rows of a (micro-batch, stage) table, one in all columns."""
    orders = np.argsort(place, axis=0, kind="stable")
    other = np.flatnonzero((orders != orders[:, :1]).any(axis=0))
    if len(other):
        raise ParameterError(
            f"reorder_backward: stages 0 and {other[0]} {what} in different orders "
            "of micro-batches; it takes schedules with one order for all stages"
        )
    return orders[:, 0]


def _grouped(ops: Ops) -> NDArray[np.bool_]:
    """Which ops are in an overlap group."""
    inside: NDArray[np.bool_] = ops.joined | np.append(ops.joined[1:], False)
    return inside


def _refuse_grouped(schedule: Schedule, which: NDArray[np.bool_], verb: str) -> None:
    wrong = np.flatnonzero(which & _grouped(schedule.ops))
    if len(wrong):
        device, step = schedule.locate(int(wrong[0]))
        raise ParameterError(
            f"device {device}, step {step}: {schedule.ops[int(wrong[0])]} is inside an "
            f"overlap group and cannot be {verb}; take it out of the group first"
        )


def _of_rows(schedule: Schedule, ops: Ops, starts: NDArray[Any]) -> Schedule:
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist())
    return schedule.with_rows([[ops[low:high]] for low, high in bounds])
