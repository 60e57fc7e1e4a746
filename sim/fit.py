"""A measured trace → the Cost that explains it, and how well it does.

Each kind of op takes, in each stage, the median of the times it took there. A
median, since the first ops of a run are slow (allocation, compilation, cold
caches) and one of them would move a mean. Ops of an overlap group have only a
joint time: they are told from those that ran alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import Kind, Trace
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, column, plain, ratio
from pipeproof.sim.cost import Cost
from pipeproof.sim.per_stage import divide

Key = tuple[Kind, int]
"""A kind of op, in a stage."""
Typical = Callable[[NDArray[Any]], Number]
"""One number for several times."""

FIELDS = {
    Kind.F: "forward",
    Kind.I: "input_grad",
    Kind.W: "weight_grad",
    Kind.B: "backward",
    Kind.R: "recompute",
    Kind.STEP: "step",
}
PAIRS = ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W])
"""Kinds of the groups that have a joint time of their own."""


ROUNDING = 1e-9
"""Of floats: a cost must explain groups by so much better to be taken."""


@dataclass(frozen=True)
class Fit:
    """A cost, and what it leaves unexplained.

    Attributes:
        cost: one number per stage for each kind that ran; no bytes.
        residual: sum of |measured - fitted| / sum of measured, over all compute
            instructions; 0 where the cost explains all of them.
        residuals: (attribute of the cost, stage) → mean of |measured - fitted|, in
            the trace's unit of time. A group counts for `overlap`, in F's stage.
        link_latency: median time from the end of a send to the end of its receive,
            of messages whose receive was there in time; None if there are none.
    """

    cost: Cost
    residual: Number
    residuals: Mapping[tuple[str, int], Number]
    link_latency: Number | None


def fit(trace: Trace, typical: Typical | None = None) -> Fit:
    """Fit a cost to a trace, one number per stage and kind of op.

    Args:
        trace: measured.
        typical: the time of several ops of one kind in one stage; default the median.

    Where ops of one kind ran only in groups, their time is what a group takes
    beyond its other ops. Where backwards ran only whole, I and W are half of B
    each, so that the cost also does for split schedules. Groups F&B take the sum of
    their ops, or the median by F's stage, whichever explains them better.

    Raises:
        ParameterError: ops whose own time cannot be told from that of their groups.
    """
    table = _Table.of(trace, typical or _median)
    known = table.alone()
    table.complete(known)
    cost = _cost(trace, known)
    joint = table.joint(known)
    if joint:
        cost = _better(trace, table, cost, replace(cost, overlap=joint))
    return _judged(trace, table, cost)


@dataclass(frozen=True)
class _Table:
    """Compute instructions of a trace.

    Attributes:
        trace: whose.
        time: how long each took, times the slices of a micro-batch.
        first, count: its ops.
        place: kind × stages + stage of its first op.
        typical: as for `fit`.
    """

    trace: Trace
    time: NDArray[Any]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    place: NDArray[np.int64]
    typical: Typical

    @staticmethod
    def of(trace: Trace, typical: Typical) -> _Table:
        program, schedule = trace.program, trace.program.schedule
        computes = program.computes
        time = (trace.end[computes] - trace.start[computes]) * schedule.slices
        first = program.first_op[computes].astype(np.int64)
        kind = schedule.ops.kind[first].astype(np.int64)
        place = kind * schedule.stages + schedule.ops.stage[first]
        count = program.op_count[computes].astype(np.int64)
        return _Table(trace, time, first, count, place, typical)

    def alone(self) -> dict[Key, Number]:
        """Times of what ran outside groups."""
        mine = np.flatnonzero(self.count == 1)
        return {
            self.key(place): self.typical(self.time[mine[where]])
            for place, where in _by_value(self.place[mine])
        }

    def key(self, place: int) -> Key:
        kind, stage = divmod(place, self.trace.program.schedule.stages)
        return Kind(kind), stage

    @cached_property
    def groups(self) -> list[tuple[tuple[Key, ...], NDArray[np.int64]]]:
        """What groups consist of, and which of the instructions do."""
        mine = np.flatnonzero(self.count > 1)
        if not len(mine):
            return []
        ops, stages = (
            self.trace.program.schedule.ops,
            self.trace.program.schedule.stages,
        )
        nth = np.arange(int(self.count[mine].max()))
        there = nth < self.count[mine, None]
        member = np.where(there, self.first[mine, None] + nth, 0)
        place = ops.kind[member].astype(np.int64) * stages + ops.stage[member]
        rows, which = np.unique(np.where(there, place, -1), axis=0, return_inverse=True)
        return [
            (
                tuple(self.key(place) for place in rows[number].tolist() if place >= 0),
                mine[where],
            )
            for number, where in _by_value(which.ravel())
        ]

    def complete(self, known: dict[Key, Number]) -> None:
        """Add what ran only in groups, as the rest of a group of known ops."""
        while missing := {key for keys, _ in self.groups for key in keys} - set(known):
            told: dict[Key, list[NDArray[Any]]] = {}
            for keys, where in self.groups:
                unknown = [key for key in keys if key in missing]
                if len(unknown) == 1:
                    rest: Any = sum(known[key] for key in keys if key in known)
                    told.setdefault(unknown[0], []).append(self.time[where] - rest)
            known |= {
                key: self.typical(np.concatenate(rows)) for key, rows in told.items()
            }
            refused = [key for key in told if known[key] < 0]
            if refused or not told:
                kind, stage = (refused or sorted(missing))[0]
                raise ParameterError(
                    f"stage {stage}: {kind.name} ran only in overlap groups, which do "
                    "not tell its own time: measure a schedule where it runs alone"
                )

    def joint(self, known: Mapping[Key, Number]) -> list[Number]:
        """Time of F&B by F's stage; F + B where a stage has none."""
        by_stage: dict[int, list[NDArray[Any]]] = {}
        for keys, where in self.groups:
            if sorted(kind for kind, _ in keys) in PAIRS:
                by_stage.setdefault(_stage(keys), []).append(self.time[where])
        if not by_stage:
            return []
        return [
            self.typical(np.concatenate(by_stage[stage]))
            if stage in by_stage
            else _apart(known, stage)
            for stage in range(self.trace.program.schedule.stages)
        ]


def _stage(keys: tuple[Key, ...]) -> int:
    """Where a group counts: in F's stage, or its first op's."""
    return next((stage for kind, stage in keys if kind == Kind.F), keys[0][1])


def _apart(known: Mapping[Key, Number], stage: int) -> Number:
    whole: Any = known.get((Kind.B, stage))
    if whole is None:
        whole = sum(known[kind, stage] for kind in (Kind.I, Kind.W))
    return plain(known[Kind.F, stage] + whole)


def _by_value(values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, starts[1:]))


def _median(times: NDArray[Any]) -> Number:
    """Of the middle two, the mean: exact where the times are."""
    ordered = np.sort(times)
    low, high = ordered[(len(times) - 1) // 2], ordered[len(times) // 2]
    return divide(plain(plain(low) + plain(high)), 2)


def _cost(trace: Trace, known: dict[Key, Number]) -> Cost:
    """The medians, in the columns of a Cost.

    Every stage has F, and B or both I and W: `check` saw to that.
    """
    stages = range(trace.program.schedule.stages)

    def column_of(kind: Kind, instead: Callable[[int], Number]) -> list[Number] | None:
        """A number per stage; None where the kind never ran."""
        there = [known.get((kind, stage)) for stage in stages]
        if all(number is None for number in there):
            return None
        return [instead(s) if n is None else n for s, n in zip(stages, there)]

    def forward(stage: int) -> Number:
        return known[Kind.F, stage]

    def split(stage: int) -> Number:
        return plain(known[Kind.I, stage] + known[Kind.W, stage])

    def half(stage: int) -> Number:
        return divide(known[Kind.B, stage], 2)

    def step(stage: int) -> Number:
        return 0

    for place in [place for place in known if place[0] == Kind.STEP]:
        known[place] = divide(known[place], trace.program.schedule.slices)
    return Cost(
        forward=list(map(forward, stages)),
        input_grad=column_of(Kind.I, half) or list(map(half, stages)),
        weight_grad=column_of(Kind.W, half) or list(map(half, stages)),
        backward=column_of(Kind.B, split),
        recompute=column_of(Kind.R, forward),
        step=column_of(Kind.STEP, step) or 0,
    )


def _fitted(trace: Trace, cost: Cost) -> NDArray[Any]:
    numbers, which = cost.priced(trace.program)
    result: NDArray[Any] = column(numbers)[which] * trace.program.schedule.slices
    return result


def _better(trace: Trace, table: _Table, one: Cost, other: Cost) -> Cost:
    """The cost that explains the groups better; the first, where both do."""
    groups = np.flatnonzero(table.count > 1)
    time = table.time[groups]
    left = [
        plain(np.abs(time - _fitted(trace, cost)[groups]).sum())
        for cost in (one, other)
    ]
    return one if left[0] <= left[1] + ROUNDING * float(time.sum()) else other


def _judged(trace: Trace, table: _Table, cost: Cost) -> Fit:
    off = np.abs(table.time - _fitted(trace, cost))
    stages = trace.program.schedule.stages
    residuals: dict[tuple[str, int], Number] = {}
    for place, where in _by_value(np.where(table.count == 1, table.place, -1)):
        if place >= 0:
            kind, stage = divmod(place, stages)
            mean = ratio(plain(off[where].sum()), len(where))
            residuals[FIELDS[Kind(kind)], stage] = mean
    by_stage: dict[int, list[NDArray[np.int64]]] = {}
    for keys, where in table.groups:
        by_stage.setdefault(_stage(keys), []).append(where)
    for stage, several in sorted(by_stage.items()):
        where = np.concatenate(several)
        residuals["overlap", stage] = ratio(plain(off[where].sum()), len(where))
    return Fit(
        cost,
        ratio(plain(off.sum()), plain(table.time.sum())),
        residuals,
        _latency(trace),
    )


def _latency(trace: Trace) -> Number | None:
    program = trace.program
    send, recv = program.send_of, program.recv_of
    in_time = trace.start[recv] <= trace.end[send]
    if not in_time.any():
        return None
    return _median((trace.end[recv] - trace.end[send])[in_time])
