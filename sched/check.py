"""Judge a schedule: one function per rule, all findings together.

Rules look at columns, so that a million good ops cost a few numpy calls; only
what is wrong becomes an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched import skips, ties
from pipeproof.sched.deps import Order, order
from pipeproof.sched.errors import ParameterError
from pipeproof.sched.findings import SHOWN, Finding, Report
from pipeproof.sched.ir import BESIDE_KINDS, STAGE_KINDS, Kind, Op, Schedule
from pipeproof.sched.judge import Judge
from pipeproof.sched.program import Program
from pipeproof.sched.stage_rules import reduced, stages_last, updated
from pipeproof.sched.streams import Buffering, StreamModel


def check(
    judged: Schedule | Program,
    *,
    streams: StreamModel | None = None,
    buffering: Buffering | None = None,
) -> Report:
    """Judge a schedule: complete, well placed, in order, free of cycles.

    Of a program, judge its messages too: both sides of each are there, links are
    first in, first out, and nothing waits in a cycle. Takes linear time. All
    findings come together; `raise_if_bad` turns them into one error.

    Args:
        judged: a schedule, or a program of one.
        streams: which of a device's streams are one, default `dir`; see
            `pipeproof.sched.streams`.
        buffering: what a send waits for, default `rendezvous`, under which what
            runs through runs through under any other. With either of these a clean
            schedule is lowered, and its program judged.

    Raises:
        ParameterError: something else than these, or a model that there is not.
        UnsupportedError: a schedule whose program is to be judged, and that is not
            lowered yet.
    """
    from pipeproof.sched.deadlock import deadlocks, known
    from pipeproof.sched.lower import lower  # lowering checks the schedule first
    from pipeproof.sched.matching import mismatches

    model: StreamModel = "dir" if streams is None else streams
    waits: Buffering = "rendezvous" if buffering is None else buffering
    known(model, waits)
    if not isinstance(judged, Schedule | Program):
        raise ParameterError(
            f"check judges a Schedule or a Program, found {type(judged).__name__}"
        )
    schedule = judged if isinstance(judged, Schedule) else judged.schedule
    report = schedule.report
    if not report.ok or (judged is schedule and streams is None and buffering is None):
        return report
    program = lower(judged) if isinstance(judged, Schedule) else judged
    found = mismatches(program) or deadlocks(program, model, waits)
    verdict = f"{report.verdict}; without deadlock, streams {model!r}, "
    return Report(schedule, found, f"{verdict}buffering {waits!r}")


def examine(schedule: Schedule) -> Report:
    """`check`, worked out anew."""
    if schedule.clean_levels is not None:
        return Report(schedule, ())
    findings = list(_numbers(schedule)) or list(_enough(schedule))
    if not findings:  # the tables that the other rules read can be built
        judge = Judge(schedule, schedule.table)
        findings = list(chain.from_iterable(rule(judge) for rule in RULES))
        if not any(finding.rule == "group" for finding in findings):
            ordered = not any(finding.rule == "order" for finding in findings)
            findings += _cycles(judge, in_rows=ordered)
    return Report(schedule, tuple(findings))


def _numbers(schedule: Schedule) -> Iterator[Finding]:
    """Stages, micro-batches, slices and steps that the header does not have."""
    ops = schedule.ops
    of_stage = np.isin(ops.kind, list(STAGE_KINDS))
    limits: list[tuple[str, NDArray[np.int32], NDArray[np.int64]]] = [
        ("stage", ops.stage, np.full(len(ops), schedule.stages)),
        (
            "micro-batch",
            ops.micro_batch,
            np.where(of_stage, schedule.steps, schedule.all_micro_batches),
        ),
        ("slice", ops.slice, np.full(len(ops), schedule.slices)),
    ]
    for what, numbers, limit in limits:
        for index in np.flatnonzero(numbers >= limit).tolist():
            device, step = schedule.locate(index)
            op = ops[index]
            name = "step" if what == "micro-batch" and of_stage[index] else what
            yield Finding(
                "numbers",
                device,
                step,
                op,
                expected=f"{name} 0 … {int(limit[index]) - 1}",
                found=f"{op} names {name} {int(numbers[index])}",
                remedy=f"Drop the op, or raise the schedule's count: {name}",
            )


def _enough(schedule: Schedule) -> Iterator[Finding]:
    """Fewer ops than stages × micro-batches need.

    Comes before anything of that size is allocated.
    """
    wanted = schedule.stages * schedule.all_micro_batches * schedule.slices
    if wanted > 4 * len(schedule) + 4096:
        yield Finding(
            "complete",
            None,
            None,
            None,
            expected=f"a forward and a backward for each of {wanted:,} (stage, "
            "micro-batch, slice)",
            found=f"only {len(schedule):,} ops",
            remedy="Add the missing ops, or lower the sizes in the header",
        )


def _placed(judge: Judge) -> Iterator[Finding]:
    schedule, ops = judge.schedule, judge.schedule.ops
    homes = np.array(schedule.placement.pipes, dtype=np.int64)
    of_stage = np.isin(ops.kind, list(STAGE_KINDS))
    micro_batch = np.where(of_stage, 0, ops.micro_batch)
    home = homes[schedule.pipe_of[micro_batch], ops.stage]
    device = schedule.device_of_op
    wrong = (home != device) & ~of_stage
    if of_stage.any():
        replicas = (homes[:, ops.stage] == device).any(axis=0)
        wrong |= of_stage & ~replicas
    for index in np.flatnonzero(wrong).tolist():
        op = ops[index]
        if op.kind in STAGE_KINDS:
            where = " or ".join(
                str(d) for d in sorted(set(homes[:, op.stage].tolist()))
            )
        else:
            where = str(judge.home(op))
        yield judge.at(
            "placement",
            index,
            expected=f"stage {op.stage} on device {where}, as the placement says",
            found=f"{op} runs on device {int(device[index])}",
            remedy=f"Move it to device {where}, or change the placement",
        )


def _once(judge: Judge) -> Iterator[Finding]:
    """No op stands twice."""
    schedule, ops = judge.schedule, judge.schedule.ops
    first = np.zeros(len(ops), dtype=np.bool_)
    for table in judge.table.by_kind.values():
        first[table[table >= 0]] = True
    of_stage = np.flatnonzero(np.isin(ops.kind, list(STAGE_KINDS)))
    seen: dict[tuple[int, Op], int] = {}
    for index in of_stage.tolist():
        key = int(schedule.device_of_op[index]), ops[index]
        first[index] = seen.setdefault(key, index) == index
    for index in np.flatnonzero(~first).tolist():
        op = ops[index]
        if op.kind in STAGE_KINDS:
            earlier = seen[int(schedule.device_of_op[index]), op]
        else:
            earlier = int(
                judge.table.by_kind[op.kind][op.micro_batch, op.slice, op.stage]
            )
        device, step = schedule.locate(earlier)
        name = judge.name(index)
        yield judge.at(
            "once",
            index,
            expected=f"each op once; {name} stands at device {device}, step {step}",
            found=f"{name} stands a second time",
            remedy="Drop one of the two",
        )


def _complete(judge: Judge) -> Iterator[Finding]:
    """F once; B, or I and W; R at most where there is an F and a backward."""
    table = judge.table
    has = {kind: table.has(kind) for kind in Kind if kind not in STAGE_KINDS}
    yield from _missing(judge, Kind.F, ~has[Kind.F], "a forward")
    neither = ~has[Kind.B] & ~has[Kind.I] & ~has[Kind.W]
    yield from _missing(judge, Kind.B, neither, "a backward: B, or I and W")
    lone_w = has[Kind.W] & ~has[Kind.I] & ~has[Kind.B]
    yield from _missing(judge, Kind.I, lone_w, "an input gradient beside its W")
    lone_i = has[Kind.I] & ~has[Kind.W] & ~has[Kind.B]
    yield from _missing(judge, Kind.W, lone_i, "a weight gradient beside its I")
    for half in (Kind.I, Kind.W):
        both = table.get(half)[has[half] & has[Kind.B]]
        for index in both.tolist():
            name = judge.name(index)
            yield judge.at(
                "complete",
                index,
                expected="either B, or I and W: B is both",
                found=f"{name} stands beside the whole backward "
                f"{name.replace(half.name, 'B')}",
                remedy="Keep one form of the backward",
            )
    lone_off = has[Kind.OFFLOAD] & ~has[Kind.RELOAD]
    yield from _missing(judge, Kind.RELOAD, lone_off, "a reload of what was offloaded")
    lone_re = has[Kind.RELOAD] & ~has[Kind.OFFLOAD]
    yield from _missing(judge, Kind.OFFLOAD, lone_re, "an offload of what is reloaded")


def _missing(
    judge: Judge, kind: Kind, gap: NDArray[np.bool_], expected: str
) -> Iterator[Finding]:
    for micro_batch, part, stage in np.argwhere(gap).tolist():
        op = Op(kind, stage, micro_batch, part)
        home = judge.home(op)
        yield Finding(
            "complete",
            home,
            None,
            op,
            expected=f"{expected}, for each stage and micro-batch",
            found=f"{op} is missing",
            remedy=f"Add {op} to device {home}",
        )


def _in_order(judge: Judge) -> Iterator[Finding]:
    """On one device, an op stands behind all that it needs."""
    schedule, ops = judge.schedule, judge.schedule.ops
    before, after = judge.table.dependencies
    late = np.flatnonzero(before > after)
    before, after = before[late], after[late]
    device, node = schedule.device_of_op, schedule.node_of_op
    wrong = (device[before] == device[after]) & (node[before] != node[after])
    wrong &= ~np.isin(ops.kind[after], list(STAGE_KINDS))
    before, after = before[wrong], after[wrong]
    by_place = np.lexsort((before, after))
    for needed, index in zip(before[by_place].tolist(), after[by_place].tolist()):
        early, needs = judge.name(index), judge.name(needed)
        own = "its own " if ops[needed][1:] == ops[index][1:] else ""
        yield judge.at(
            "order",
            index,
            expected=f"{needs} first, at step {schedule.locate(needed)[1]} now",
            found=f"{early} runs before {own}{needs}",
            remedy=f"Move {needs} ahead of {early}" + (", or drop both" if own else ""),
        )
    yield from stages_last(judge)


def _groups(judge: Judge) -> Iterator[Finding]:
    """Ops of an overlap group compute, and none needs another of its group."""
    if not judge.schedule.ops.joined.any():
        return
    before, after = judge.table.dependencies
    node = judge.schedule.node_of_op
    same = node[before] == node[after]
    for needed, index in zip(before[same].tolist(), after[same].tolist()):
        yield judge.at(
            "group",
            index,
            expected="ops of an overlap group to be independent of each other",
            found=f"{judge.name(index)} needs {judge.name(needed)} of its own group",
            remedy="Take one of them out of the group",
        )
    ops = judge.schedule.ops
    alone = np.bincount(node)[node] == 1
    beside = np.isin(ops.kind, [*BESIDE_KINDS, *STAGE_KINDS]) & ~alone
    for index in np.flatnonzero(beside).tolist():
        yield judge.at(
            "group",
            index,
            expected="ops that compute in an overlap group: they share the device",
            found=f"{judge.name(index)} runs beside the compute stream anyway",
            remedy="Take it out of the group",
        )


def _offloads(judge: Judge) -> Iterator[Finding]:
    """OFFLOADs go to the host or to another device."""
    schedule = judge.schedule
    for device, target in enumerate(schedule.offload_to):
        if target is None or (target < schedule.devices and target != device):
            continue
        found = "itself" if target == device else f"device {target}"
        yield Finding(
            "offload-to",
            device,
            None,
            None,
            expected=f"another device of 0 … {schedule.devices - 1}, or the host",
            found=f"its OFFLOADs go to {found}",
            remedy="Name in offload_to the device whose memory takes them",
        )


def _skips(judge: Judge) -> Iterator[Finding]:
    """Skip connections lead over at least one stage to a later one."""
    for skip, found, remedy in skips.wrong(judge.schedule):
        yield Finding(
            "skips",
            None,
            None,
            None,
            expected=f"skips from a stage to one of 0 … {judge.schedule.stages - 1} "
            "that is at least two further on",
            found=f"{skips.named(skip)}: {found}",
            remedy=remedy,
        )


def _ties(judge: Judge) -> Iterator[Finding]:
    """Stages that share parameters are there."""
    for tie, found, remedy in ties.wrong(judge.schedule):
        yield Finding(
            "ties",
            None,
            None,
            None,
            expected=f"ties of stages of 0 … {judge.schedule.stages - 1}",
            found=f"{ties.named(tie)}: {found}",
            remedy=remedy,
        )


def _cycles(judge: Judge, *, in_rows: bool) -> Iterator[Finding]:
    """Device order and dependencies together have no cycle.

    Args:
        judge: the schedule and its tables.
        in_rows: report one inside a single row too; the rule of order has named
            those that it found.
    """
    schedule = judge.schedule
    stuck = schedule.level_of_node < 0
    if not stuck.any():
        return
    graph = order(schedule, judge.table)
    ring = _ring(graph, stuck)
    devices = schedule.device_of_op[graph.first_op[ring]]
    if not in_rows and len(set(devices.tolist())) == 1:
        return
    names = [
        f"{schedule.ops[index]} (device {schedule.locate(index)[0]})"
        for index in graph.first_op[[*ring, ring[0]]].tolist()
    ]
    if len(names) > SHOWN:
        left_out = f"({len(names) - SHOWN + 1:,} more)"
        names[SHOWN // 2 : 1 - SHOWN // 2] = [left_out]
    yield judge.at(
        "cycle",
        int(graph.first_op[ring[0]]),
        expected="an order in which some op can always run",
        found=f"{int(stuck.sum()):,} ops wait for each other: " + " → ".join(names),
        remedy="Reorder the ops of one of these devices",
    )


def _ring(graph: Order, stuck: NDArray[np.bool_]) -> list[int]:
    """One cycle: every stuck node has a stuck predecessor, so walk back."""
    both = stuck[graph.before] & stuck[graph.after]
    waits_for = np.full(len(stuck), -1, dtype=np.int64)
    waits_for[graph.after[both]] = graph.before[both]
    walk: dict[int, int] = {}
    node = int(graph.after[both][0])
    while node not in walk:
        walk[node] = len(walk)
        node = int(waits_for[node])
    return list(walk)[walk[node] :][::-1]


RULES: tuple[Callable[[Judge], Iterator[Finding]], ...] = (
    _placed,
    _once,
    _complete,
    reduced,
    updated,
    _in_order,
    _groups,
    _offloads,
    _skips,
    _ties,
)
"""Every rule but the numbers, which the others rely on, and the cycles, last."""
