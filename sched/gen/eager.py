"""Eager 1F1B: forwards run ahead, so that links have time to deliver."""

from __future__ import annotations

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.ir import B, F, Schedule, alternate
from pipeproof.sched.row import Row


def eager_1f1b(devices: int, micro_batches: int) -> Schedule:
    """1F1B that hides the latency of links, for activations of its own.

    Device d runs 2(p-1-d) forwards ahead of the steady state, 1F1B p-1-d: each
    message has the time of one more forward and backward to arrive.

    With p=2, m=3, every op one tick::

        device 0 | F0 F1 F2 B0 .. B1 .. B2
        device 1 | .. F0 B0 F1 B1 F2 B2 ..

    Placement: stage d on device d.
    Bubble: (p-1)/(m+p-1) of step time; equal stages, free links.
    Peak memory: min(2(p-1-d)+1, m) micro-batch activations on device d.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Zhuang et al. 2022, arXiv:2211.05322 (eager 1F1B).
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    rows = []
    for d in range(p):
        warmup = min(2 * (p - 1 - d), m)
        steady = m - warmup
        rows.append(
            [
                F(d, range(warmup)),
                alternate(F(d, range(warmup, m)), B(d, range(steady))),
                B(d, range(steady, m)),
            ]
        )
    return Schedule.of(rows, name="eager-1f1b")


EAGER_1F1B = Row(
    name="eager-1f1b",
    generator=eager_1f1b,
    summary="1F1B where links are slow: messages have time to arrive",
    source="Zhuang et al. 2022, 2211.05322",
    constraints="none",
    bubble="(p-1)/(m+p-1)",
    peak="min(2(p-1-d)+1, m)",
    idle=lambda case: case.fill_drain,
    peak_of=lambda case, d: min(2 * (case.p - 1 - d) + 1, case.m),
)
