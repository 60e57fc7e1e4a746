"""Fewer micro-batches, or more.

More of them only where a steady state shows how the schedule goes on. Each device
then has a window of ops that the next ops repeat with micro-batches k higher::

    F0 F1 | F2 B0 | F3 B1 | F4 B2 | B3 B4        k = 1, the window is F2 B0
    F0 F1 | F2 B0 | F3 B1 | F4 B2 | F5 B3 | B4 B5

and one more window is put behind it, with all that follows moved up by k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.ir import STAGE_KINDS, Ops, Schedule


def with_micro_batches(schedule: Schedule, micro_batches: int) -> Schedule:
    """The same schedule for fewer or more micro-batches.

    Fewer: the ops of those numbered from `micro_batches` on are dropped, and the
    others keep their order. What a generator makes of the smaller number can be
    better: a warm-up that was cut for more stays as it was.

    More: the steady state goes on. It is derived: the smallest k such that on
    every device some window of ops, each stage's ops for k micro-batches, is
    repeated by the ops right behind it with micro-batches k higher. 1F1B has
    k = 1, from one micro-batch more than devices on; interleaved schedules the
    size of their groups. GPipe has none: it does not repeat, it widens.

    Args:
        schedule: of one pipe and one step.
        micro_batches: how many it shall have.

    Raises:
        ParameterError: below 1, several pipes or steps, no steady state, or a
            number that is not reached in steps of k.
        ScheduleError: `check` has findings.
    """
    at_least_one(micro_batches=micro_batches)
    if len(schedule.placement.pipes) > 1 or schedule.steps > 1:
        raise ParameterError(
            f"{schedule.summary}: with_micro_batches takes a schedule of one pipe and "
            f"one step, got {len(schedule.placement.pipes)} and {schedule.steps}"
        )
    schedule.report.raise_if_bad()
    if micro_batches > schedule.micro_batches:
        return _extended(schedule, micro_batches)
    if micro_batches == schedule.micro_batches:
        return schedule
    rows = [
        _shortened(schedule.row(device), micro_batches)
        for device in range(schedule.devices)
    ]
    return _resized(schedule, rows, micro_batches)


def _resized(schedule: Schedule, rows: list[Ops], micro_batches: int) -> Schedule:
    return Schedule.of(
        [[row] for row in rows],
        name=schedule.name,
        placement=schedule.placement,
        micro_batches=micro_batches,
        slices=schedule.slices,
        offload_to=schedule.offload_to,
    )


def _of_micro_batches(row: Ops) -> NDArray[np.bool_]:
    return ~np.isin(row.kind, list(STAGE_KINDS))


def _shortened(row: Ops, micro_batches: int) -> Ops:
    keep = ~_of_micro_batches(row) | (row.micro_batch < micro_batches)
    group = np.cumsum(~row.joined)[keep]
    # What is left of a group opens with its first op that is left.
    joined = np.append(False, group[1:] == group[:-1])[: len(group)]
    return row.take(keep).grouped(joined)


def _extended(schedule: Schedule, micro_batches: int) -> Schedule:
    rows = [schedule.row(device) for device in range(schedule.devices)]
    for period in range(1, schedule.micro_batches // 2 + 1):
        ends = [_window(row, schedule.micro_batches, period) for row in rows]
        if None in ends:
            continue
        times, rest = divmod(micro_batches - schedule.micro_batches, period)
        if rest:
            raise ParameterError(
                f"{schedule.summary}: its steady state repeats every {period} "
                f"micro-batches, so it can have {micro_batches - rest} or "
                f"{micro_batches - rest + period} of them, not {micro_batches}"
            )
        longer = [
            _repeated(row, end, period, times)
            for row, end in zip(rows, ends)
            if end is not None
        ]
        result = _resized(schedule, longer, micro_batches)
        if result.report.ok:
            return result
    raise ParameterError(
        f"{schedule.summary}: no steady state repeats on every device, so what more "
        "micro-batches would do is not known; make the schedule anew, or start from "
        "one of more micro-batches"
    )


def _window(row: Ops, micro_batches: int, period: int) -> tuple[int, int] | None:
    """First and last (excluded) op of a window that is repeated behind it."""
    ours = _of_micro_batches(row)
    if not ours.any():
        return 0, 0
    # A warm-up or a last micro-batch may differ; one in the middle is as most are.
    each = int((ours & (row.micro_batch == micro_batches // 2)).sum())
    length = period * each
    if not length or 2 * length > len(row):
        return None
    same = ours[length:] & ours[:-length]
    for column in (row.kind, row.stage, row.slice, row.joined):
        same &= column[length:] == column[:-length]
    same &= row.micro_batch[length:] == row.micro_batch[:-length] + period
    run = np.concatenate([[0], np.cumsum(same)])
    starts = np.flatnonzero(run[length:] - run[:-length] == length)
    for start in starts[~row.joined[starts]].tolist():
        window = row[start : start + length]
        ops = np.stack([window.kind, window.stage, window.slice])
        _, counts = np.unique(ops, axis=1, return_counts=True)
        if (counts == period).all():
            return start, start + length
    return None


def _repeated(row: Ops, window: tuple[int, int], period: int, times: int) -> Ops:
    start, end = window
    parts = [row[:end]]
    parts += [_moved(row[start:end], period * n) for n in range(1, times)]
    return Ops.of([*parts, _moved(row[start:], period * times)])


def _moved(row: Ops, by: int) -> Ops:
    micro_batch = row.micro_batch + np.where(_of_micro_batches(row), by, 0)
    return Ops(row.kind, row.stage, micro_batch.astype(np.int32), row.slice, row.joined)
