"""GPipe: fill the pipeline with all forwards, then drain all backwards."""

from __future__ import annotations

from typing import Literal

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.ir import B, F, Schedule
from pipeproof.sched.row import Case, Row


def gpipe(
    devices: int, micro_batches: int, *, backward: Literal["lifo", "fifo"] = "lifo"
) -> Schedule:
    """Synchronous SGD over micro-batches, with one flush between the phases.

    With p=2, m=3, every op one tick::

        device 0 | F0 F1 F2 .. .. B2 B1 B0
        device 1 | .. F0 F1 F2 B2 B1 B0 ..

    Placement: stage s on device s.
    Bubble: (p-1)/(m+p-1) of step time; equal stages, free links.
    Peak memory: m micro-batch activations on every device; 1 with recomputation
        always, beside m stored inputs.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.
        backward: order of the backwards: last in, first out as published, or
            first in, first out.

    Raises:
        ParameterError: a size below 1, or an unknown order.

    Source:
        Huang et al. 2018, arXiv:1811.06965, 2.2 and 2.3.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    if backward not in ("lifo", "fifo"):
        raise ParameterError(f"backward must be 'lifo' or 'fifo', got {backward!r}")
    every = range(micro_batches)
    back = every[::-1] if backward == "lifo" else every
    return Schedule.of(
        [[F(s, every), B(s, back)] for s in range(devices)], name="gpipe"
    )


GPIPE = Row(
    name="gpipe",
    generator=gpipe,
    summary="simplest; with recomputation, lightest on short pipelines",
    source="Huang et al. 2018, 1811.06965, 2.2-2.3",
    constraints="none",
    bubble="(p-1)/(m+p-1)",
    peak="m",
    idle=lambda case: case.fill_drain,
    peak_of=lambda case, d: case.m,
    figure=Case(4, 4, input_grad=1, weight_grad=0),
)
