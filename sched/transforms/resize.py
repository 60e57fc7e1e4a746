"""Fewer micro-batches, or more.

More of them only where a steady state shows how the schedule goes on. Each device
then has a window of ops that the next ops repeat with micro-batches k higher::

    F0 F1 | F2 B0 | F3 B1 | F4 B2 | B3 B4        k = 1, the window is F2 B0
    F0 F1 | F2 B0 | F3 B1 | F4 B2 | F5 B3 | B4 B5

and one more window is put behind it, with all that follows moved up by k.

With several pipes, all this counts a micro-batch by its turn: how many of its pipe
have a lower number. A window has k micro-batches of each pipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.ir import STAGE_KINDS, Ops, Schedule

Index = NDArray[np.int64]
Pipes = NDArray[np.int16]


def with_micro_batches(schedule: Schedule, micro_batches: int) -> Schedule:
    """The same schedule for fewer or more micro-batches.

    Fewer: the ops of the last micro-batches are dropped, and the others keep their
    order. What a generator makes of the smaller number can be better: a warm-up that
    was cut for more stays as it was. Of several pipes each gives some up: those with
    the lowest turns stay, and are numbered anew without gaps.

    More: the steady state goes on. It is derived: the smallest k such that on
    every device some window of ops, each stage's ops for k micro-batches of each
    pipe, is repeated by the ops right behind it with turns k higher. 1F1B has
    k = 1, from one micro-batch more than devices on; interleaved schedules the
    size of their groups, Chimera half its devices. GPipe has none: it does not
    repeat, it widens. What is there keeps its number, the new ones come behind.

    Args:
        schedule: of one step.
        micro_batches: how many it shall have.

    Raises:
        ParameterError: below 1, several steps, no steady state, or a number that is
            not reached in steps of k for each pipe.
        ScheduleError: `check` has findings.
    """
    at_least_one(micro_batches=micro_batches)
    if schedule.steps > 1:
        raise ParameterError(
            f"{schedule.summary}: with_micro_batches takes a schedule of one step, got "
            f"{schedule.steps}"
        )
    schedule.report.raise_if_bad()
    if micro_batches > schedule.micro_batches:
        return _extended(schedule, micro_batches)
    if micro_batches == schedule.micro_batches:
        return schedule
    in_turn = np.lexsort((schedule.pipe_of, _turns(schedule.pipe_of)))
    kept = np.sort(in_turn[:micro_batches])
    rows = [_shortened(schedule.row(d), kept) for d in range(schedule.devices)]
    return _resized(schedule, rows, schedule.pipe_of[kept])


def _resized(schedule: Schedule, rows: list[Ops], pipe_of: Pipes) -> Schedule:
    return Schedule.of(
        [[row] for row in rows],
        name=schedule.name,
        placement=schedule.placement,
        micro_batches=len(pipe_of),
        slices=schedule.slices,
        pipe_of=pipe_of,
        offload_to=schedule.offload_to,
        skips=schedule.skips,
        ties=schedule.ties,
    )


def _turns(pipe_of: Pipes) -> Index:
    """How many of its pipe come ahead of each micro-batch."""
    result = np.empty(len(pipe_of), dtype=np.int64)
    for pipe in np.unique(pipe_of):
        members = np.flatnonzero(pipe_of == pipe)
        result[members] = np.arange(len(members))
    return result


def _of_micro_batches(row: Ops) -> NDArray[np.bool_]:
    return ~np.isin(row.kind, list(STAGE_KINDS))


def _renumbered(row: Ops, micro_batch: Index) -> Ops:
    """The same ops of other micro-batches."""
    number = np.where(_of_micro_batches(row), micro_batch, 0).astype(np.int32)
    return Ops(row.kind, row.stage, number, row.slice, row.joined)


def _shortened(row: Ops, kept: Index) -> Ops:
    """Without the ops of other micro-batches, and these numbered without gaps."""
    keep = ~_of_micro_batches(row) | np.isin(row.micro_batch, kept)
    group = np.cumsum(~row.joined)[keep]
    # What is left of a group opens with its first op that is left.
    joined = np.append(False, group[1:] == group[:-1])[: len(group)]
    left = row.take(keep).grouped(joined)
    return _renumbered(left, np.searchsorted(kept, left.micro_batch))


def _extended(schedule: Schedule, micro_batches: int) -> Schedule:
    turns = _turns(schedule.pipe_of)
    rows = [_Row.of(schedule, device, turns) for device in range(schedule.devices)]
    pipes, counts = np.unique(schedule.pipe_of, return_counts=True)
    middle = int(counts.min()) // 2
    for period in range(1, int(counts.min()) // 2 + 1):
        windows = [row.window(middle, period) for row in rows]
        if None in windows:
            continue
        step = period * len(pipes)
        times, rest = divmod(micro_batches - schedule.micro_batches, step)
        if rest:
            raise ParameterError(
                f"{schedule.summary}: its steady state repeats every {step} "
                f"micro-batches, so it can have {micro_batches - rest} or "
                f"{micro_batches - rest + step} of them, not {micro_batches}"
            )
        pipe_of = _more(schedule.pipe_of, period * times)
        number = np.zeros((len(schedule.placement.pipes), micro_batches), np.int64)
        number[pipe_of, _turns(pipe_of)] = np.arange(micro_batches)
        longer = [
            row.repeated(window, period, times).ops(number)
            for row, window in zip(rows, windows)
            if window is not None
        ]
        result = _resized(schedule, longer, pipe_of)
        if result.report.ok:
            return result
    raise ParameterError(
        f"{schedule.summary}: no steady state repeats on every device, so what more "
        "micro-batches would do is not known; make the schedule anew, or start from "
        "one of more micro-batches"
    )


def _more(pipe_of: Pipes, each: int) -> Pipes:
    """The pipes with so many micro-batches more on each, in the order of turns."""
    pipes, counts = np.unique(pipe_of, return_counts=True)
    pipe = np.repeat(pipes, each)
    turn = np.repeat(counts, each) + np.tile(np.arange(each), len(pipes))
    return np.append(pipe_of, pipe[np.lexsort((pipe, turn))])


@dataclass(frozen=True, slots=True)
class _Row:
    """A device's ops, with the pipe and the turn of each one's micro-batch."""

    row: Ops
    pipe: Pipes
    turn: Index

    @classmethod
    def of(cls, schedule: Schedule, device: int, turns: Index) -> _Row:
        row = schedule.row(device)
        return cls(row, schedule.pipe_of[row.micro_batch], turns[row.micro_batch])

    def ops(self, number: Index) -> Ops:
        """The ops, of the micro-batches that have this number (by pipe and turn)."""
        return _renumbered(self.row, number[self.pipe, self.turn])

    def window(self, middle: int, period: int) -> tuple[int, int] | None:
        """First and last (excluded) op of a window that is repeated behind it."""
        row, turn = self.row, self.turn
        ours = _of_micro_batches(row)
        if not ours.any():
            return 0, 0
        # A warm-up or a last micro-batch may differ; those in the middle are as most.
        length = int((ours & (middle <= turn) & (turn < middle + period)).sum())
        if not length or 2 * length > len(row):
            return None
        same = ours[length:] & ours[:-length]
        for column in (row.kind, row.stage, row.slice, row.joined, self.pipe):
            same &= column[length:] == column[:-length]
        same &= turn[length:] == turn[:-length] + period
        run = np.concatenate([[0], np.cumsum(same)])
        starts = np.flatnonzero(run[length:] - run[:-length] == length)
        for start in starts[~row.joined[starts]].tolist():
            at = slice(start, start + length)
            columns = (row.kind, row.stage, row.slice, self.pipe, turn % period)
            if np.unique([c[at] for c in columns], axis=1).shape[1] == length:
                return start, start + length
        return None

    def repeated(self, window: tuple[int, int], period: int, times: int) -> _Row:
        """With the window so many times more, and all behind it moved up."""
        start, end = window
        parts = [slice(0, end), *[slice(start, end)] * (times - 1), slice(start, None)]
        return _Row(
            Ops.of([self.row[part] for part in parts]),
            np.concatenate([self.pipe[part] for part in parts]),
            np.concatenate(
                [self.turn[part] + period * n for n, part in enumerate(parts)]
            ),
        )
