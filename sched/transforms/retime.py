"""The same ops in an order that suits their times.

List scheduling (`list_order.py`) gives several orders; the one that ends first, run
as its program, is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number, is_number, plain
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import BESIDE_KINDS, Kind, Schedule
from pipeproof.sched.lower import lower
from pipeproof.sched.matching import meetings
from pipeproof.sched.transforms.list_order import orders
from pipeproof.sched.transforms.op_graph import Graph

PerStage = Number | Sequence[Number]


def retime(
    schedule: Schedule,
    times: Mapping[Kind, PerStage],
    *,
    overlap: PerStage | None = None,
    activations: Number | None = None,
    link_latency: Number = 0,
) -> Schedule:
    """The same ops on the same devices, ordered for these times.

    Without a cap the result never takes longer than the schedule that is given,
    which is kept where no other order is faster; so too under a cap that it
    keeps itself. Deterministic. A heuristic: a faster order may exist.

    Args:
        schedule: of one step. Overlap groups stay together.
        times: for each kind, the time of one op, or one per stage. Unlike in
            `Cost`, a number is that of a stage, not of a device's whole share,
            and of a slice. B defaults to I + W, R to F; REDUCE, STEP, OFFLOAD and
            RELOAD to 0.
        overlap: joint time of a group F&B (or F&I&W), by F's stage; default, and of
            any other group, the sum of its ops' times.
        activations: at most so many live activations on each device at any time,
            in micro-batches of its share; counted as `peak_activations` does,
            from the start of F (or R) to the end of B, or of W. What is offloaded
            does not count while it is away; it counts as if it stayed where copies
            take time.
        link_latency: from the end of an op to its tensor on another device.

    Raises:
        ParameterError: a time that is missing, negative or not finite, a cap that
            no order found here keeps, or one where devices OFFLOAD to each other.
        ScheduleError: `check` has findings.
        UnsupportedError: ops that are not lowered yet.
    """
    _number("link_latency", link_latency)
    if activations is not None:
        _number("activations", activations)
        if schedule.offloads_to_devices:
            raise ParameterError(
                f"{schedule.summary}: a cap on activations is for what a device keeps "
                "of its own or OFFLOADs to the host, but here devices keep each other's"
            )
    lower(schedule)  # refuses what cannot be timed
    durations = _durations(schedule, times, overlap)
    graph = Graph.of(schedule, durations, link_latency)
    best: Schedule | None = None
    best_time: Number = 0
    seen: set[str] = set()
    for rows in orders(graph, activations):
        candidate = schedule.with_rows(
            [[schedule.ops[graph.span(node)] for node in row] for row in rows]
        )
        if candidate.digest not in seen:
            seen.add(candidate.digest)
            durations = _durations(candidate, times, overlap)
            time = _makespan(candidate, durations, link_latency)
            if best is None or time < best_time:
                best, best_time = candidate, time
    if best is None:
        raise ParameterError(
            f"{schedule.summary}: found no order with at most {activations} live "
            "activations on each device; one micro-batch alone brings "
            f"{plain(graph.least)}"
        )
    return best


def _number(name: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < math.inf:  # type: ignore[operator]
        raise ParameterError(
            f"{name} must be a finite number of at least 0, got {value!r}"
        )


def _durations(
    schedule: Schedule, times: Mapping[Kind, PerStage], overlap: PerStage | None
) -> list[Number]:
    """The time of each op; a joint one whole on its group's first."""
    if unknown := [key for key in times if not isinstance(key, Kind)]:
        raise ParameterError(
            f"times has keys of Kind, such as Kind.F, got {unknown[0]!r}"
        )
    by_stage: dict[Kind, list[Number]] = {}
    for kind, value in times.items():
        by_stage[kind] = _per_stage(f"times[{kind.name}]", value, schedule.stages)
    if Kind.I in by_stage and Kind.W in by_stage:
        both = zip(by_stage[Kind.I], by_stage[Kind.W])
        by_stage.setdefault(Kind.B, [plain(i + w) for i, w in both])
    if Kind.F in by_stage:
        by_stage.setdefault(Kind.R, by_stage[Kind.F])
    for kind in (*BESIDE_KINDS, Kind.STEP):
        by_stage.setdefault(kind, [0] * schedule.stages)
    for kind in sorted(set(Kind) - by_stage.keys()):
        if schedule.has(kind):
            raise ParameterError(f"times lacks {kind.name}, of which there are ops")
    pairs = zip(schedule.ops.kind.tolist(), schedule.ops.stage.tolist())
    result = [by_stage[Kind(kind)][stage] for kind, stage in pairs]
    if overlap is not None:
        joint = _per_stage("overlap", overlap, schedule.stages)
        for members, stage in _pairs(schedule):
            for op in members:
                result[op] = 0
            result[members.start] = joint[stage]
    return result


def _per_stage(name: str, value: PerStage, stages: int) -> list[Number]:
    given = [value] * stages if is_number(value) else list(value)  # type: ignore[arg-type]
    if len(given) != stages:
        raise ParameterError(
            f"{name} has {len(given)} numbers for {stages} stages: give one number, or "
            "one per stage"
        )
    for number in given:
        _number(name, number)
    return [plain(number) for number in given]


def _pairs(schedule: Schedule) -> Iterator[tuple[range, int]]:
    """Each group F&B or F&I&W, with the stage of its F."""
    ops = schedule.ops
    first = np.flatnonzero(~ops.joined)
    for start, end in pairwise([*first.tolist(), len(ops)]):
        kinds = ops.kind[start:end].tolist()
        if sorted(kinds) in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]):
            yield range(start, end), int(ops.stage[start + kinds.index(Kind.F)])


def _makespan(
    schedule: Schedule, durations: list[Number], link_latency: Number
) -> Number:
    """When the last instruction of the program ends."""
    program = lower(schedule)
    ends: list[Any] = [0] * len(program)
    stream_free: list[Any] = [0] * len(program.streams)
    waits, first = program.waits_for.to_lists(), program.first_op.tolist()
    count, action = program.op_count.tolist(), program.action.tolist()
    send_of = program.send_of.tolist()
    stream, message = program.stream.tolist(), program.message.tolist()
    met = {i: group.tolist() for group in meetings(program) for i in group.tolist()}
    for i in range(len(program)):  # each comes after all that it waits for
        start = max([stream_free[stream[i]], *(ends[before] for before in waits[i])])
        if action[i] == Action.RECV:
            start = max(start, ends[send_of[message[i]]] + link_latency)
        ends[i] = start + sum(durations[first[i] : first[i] + count[i]])
        stream_free[stream[i]] = ends[i]
        if i in met and i == max(met[i]):  # starts on all its devices at once
            last = max(ends[j] for j in met[i])
            for j in met[i]:
                ends[j] = stream_free[stream[j]] = last
    latest: Number = max(ends, default=0)
    return latest
