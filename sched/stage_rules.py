"""The rules of `check` about REDUCE and STEP: there is one, and it comes last."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeproof.sched.findings import Finding
from pipeproof.sched.ir import STAGE_KINDS, Kind, Op, Schedule
from pipeproof.sched.judge import Judge
from pipeproof.sched.ties import named, tied_stages, ties_of_stage


def reduced(judge: Judge) -> Iterator[Finding]:
    """A stage with replicas on several devices has a REDUCE on each, every step."""
    schedule, ops = judge.schedule, judge.schedule.ops
    if len(schedule.placement.pipes) == 1:
        return
    there = {
        (op.stage, op.micro_batch, int(schedule.device_of_op[index]))
        for index in np.flatnonzero(ops.kind == Kind.REDUCE).tolist()
        for op in [ops[index]]
    }
    homes = np.array(schedule.placement.pipes)
    for step in range(schedule.steps):
        for stage in range(schedule.stages):
            devices = sorted(set(homes[:, stage].tolist()))
            for device in devices if len(devices) > 1 else ():
                if (stage, step, device) not in there:
                    op = Op(Kind.REDUCE, stage, step)
                    yield Finding(
                        "complete",
                        device,
                        None,
                        op,
                        expected=f"the replicas of stage {stage} on devices "
                        f"{', '.join(map(str, devices))} to sum their gradients",
                        found=f"{op} is missing",
                        remedy=f"Add {op} to device {device}, after its last backward",
                    )


def updated(judge: Judge) -> Iterator[Finding]:
    """Where one stage has a STEP all have, on each of their devices, every step."""
    schedule, ops = judge.schedule, judge.schedule.ops
    steps = np.flatnonzero(ops.kind == Kind.STEP)
    if not len(steps):
        return
    there = {
        (op.stage, op.micro_batch, int(schedule.device_of_op[index]))
        for index in steps.tolist()
        for op in [ops[index]]
    }
    homes = np.array(schedule.placement.pipes)
    for step in range(schedule.steps):
        for stage in range(schedule.stages):
            for device in sorted(set(homes[:, stage].tolist())):
                if (stage, step, device) in there:
                    continue
                op = Op(Kind.STEP, stage, step)
                yield Finding(
                    "complete",
                    device,
                    None,
                    op,
                    expected="a STEP of each stage on each device that holds it, as "
                    "others have",
                    found=f"{op} is missing, and the weights there stay as they were",
                    remedy=f"Add {op} to device {device}, after its last backward (or "
                    "with_steps, which adds what is missing)",
                )


def stages_last(judge: Judge) -> Iterator[Finding]:
    """REDUCE comes after a stage's last backward on its device, STEP after both.

    The STEP of a stage that is in a tie comes after all that its device does.
    """
    schedule, ops = judge.schedule, judge.schedule.ops
    stage_ops = np.flatnonzero(np.isin(ops.kind, list(STAGE_KINDS)))
    finished = judge.table.get(Kind.B, Kind.W)
    reduced = {
        (int(schedule.device_of_op[index]), ops[index][1:]): index
        for index in stage_ops.tolist()
        if ops.kind[index] == Kind.REDUCE
    }
    tied, last_of_all = tied_stages(schedule), _last_of_devices(schedule)
    for index in stage_ops.tolist():
        op, device = ops[index], int(schedule.device_of_op[index])
        name = judge.name(index)
        if op.kind == Kind.STEP and op.stage in tied:
            if last_of_all[device] > index:
                yield _too_early(judge, index, last_of_all[device])
            continue
        first = op.micro_batch * schedule.micro_batches
        own = finished[first : first + schedule.micro_batches, :, op.stage]
        own = own[own >= 0]
        own = own[schedule.device_of_op[own] == device]
        last = int(own.max(initial=-1))
        if op.kind == Kind.STEP:
            last = max(last, reduced.get((device, op[1:]), -1))
        if last > index:
            yield judge.at(
                "order",
                index,
                expected=f"{name} after all of its stage, {judge.name(last)} too",
                found=f"{name} runs before {judge.name(last)} of its stage",
                remedy=f"Move {name} behind step {schedule.locate(last)[1]}",
            )


def _last_of_devices(schedule: Schedule) -> list[int]:
    """Of each device the last op that is no STEP; -1 where it has none."""
    others = np.flatnonzero(schedule.ops.kind != Kind.STEP)
    last = np.full(schedule.devices, -1, dtype=np.int64)
    np.maximum.at(last, schedule.device_of_op[others], others)
    return [int(index) for index in last]


def _too_early(judge: Judge, index: int, last: int) -> Finding:
    """The STEP of a stage that is in a tie, with more than STEPs behind it."""
    schedule, op = judge.schedule, judge.schedule.ops[index]
    ties = [named(schedule.ties[n]) for n in ties_of_stage(schedule, op.stage)]
    return judge.at(
        "order",
        index,
        expected=f"{judge.name(index)} behind all but STEPs of its device: it waits "
        f"for the sum of {', '.join(ties)}, and so for other devices",
        found=f"{judge.name(index)} runs before {judge.name(last)}",
        remedy=f"Move it behind step {schedule.locate(last)[1]} (with_steps puts it "
        "there, if the schedule has its ties before)",
    )
