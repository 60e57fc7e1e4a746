"""1F1B with a flush: after warm-up, one forward, one backward, in turn."""

from __future__ import annotations

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.ir import B, F, Schedule, alternate
from pipeproof.sched.row import Row


def one_f_one_b(devices: int, micro_batches: int) -> Schedule:
    """GPipe's bubble with fewer live activations.

    With p=2, m=3, every op one tick::

        device 0 | F0 F1 .. B0 F2 B1 .. B2
        device 1 | .. F0 B0 F1 B1 F2 B2 ..

    Placement: stage s on device s.
    Bubble: (p-1)/(m+p-1) of step time; equal stages, free links.
    Peak memory: min(p-s, m) micro-batch activations on device s.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Narayanan et al. 2021, arXiv:2104.04473, 2.2.1. Their bubble
        divides by ideal time instead: (p-1)/m.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    rows = []
    for s in range(p):
        warmup = min(p - 1 - s, m)
        steady = m - warmup
        rows.append(
            [
                F(s, range(warmup)),
                alternate(F(s, range(warmup, m)), B(s, range(steady))),
                B(s, range(steady, m)),
            ]
        )
    return Schedule.of(rows, name="1f1b")


ONE_F_ONE_B = Row(
    name="1f1b",
    generator=one_f_one_b,
    summary="the default: GPipe's bubble, activations bounded by the pipeline",
    source="Narayanan et al. 2021, 2104.04473, 2.2.1",
    constraints="none",
    bubble="(p-1)/(m+p-1)",
    peak="min(p-d, m)",
    idle=lambda case: case.fill_drain,
    peak_of=lambda case, d: min(case.p - d, case.m),
)
