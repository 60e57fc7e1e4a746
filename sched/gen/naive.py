"""Naive model parallelism: one micro-batch at a time through all devices."""

from __future__ import annotations

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.ir import B, F, Schedule, alternate
from pipeproof.sched.row import Case, Row


def naive(devices: int, micro_batches: int) -> Schedule:
    """What splitting a model over devices gives without a pipeline.

    With p=2, m=2, every op one tick::

        device 0 | F0 .. .. B0 F1 .. .. B1
        device 1 | .. F0 B0 .. .. F1 B1 ..

    Placement: stage s on device s.
    Bubble: (p-1)/p of step time; equal stages, free links.
    Peak memory: 1 micro-batch activation on every device.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        The baseline of Huang et al. 2018, arXiv:1811.06965, figure 2(b).
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    every = range(micro_batches)
    rows = [[alternate(F(s, every), B(s, every))] for s in range(devices)]
    return Schedule.of(rows, name="naive")


NAIVE = Row(
    name="naive",
    generator=naive,
    summary="the baseline: what a split without a pipeline costs",
    source="Huang et al. 2018, 1811.06965, fig. 2(b)",
    constraints="none",
    bubble="(p-1)/p",
    peak="1",
    idle=lambda case: (case.p - 1) * case.ideal,
    peak_of=lambda case, d: 1,
    figure=Case(4, 1),
)
