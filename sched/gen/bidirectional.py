"""Bidirectional pipelines: one goes down the devices, the other comes up.

Each device holds a stage of either, with weights of its own: twice the weights,
and at the end of the step the two devices that hold a stage sum its gradients
(REDUCE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import ratio
from pipeproof.sched.ir import (
    B,
    F,
    Ops,
    Schedule,
    alternate,
)
from pipeproof.sched.placement import Placement
from pipeproof.sched.row import Bounds, Case, Row
from pipeproof.sched.transforms.reduce import reduced_behind


def gems(devices: int, micro_batches: int) -> Schedule:
    """Two replicas, one micro-batch in flight on each: the least activations.

    With p=3, m=3, every op one tick::

        device 0 | 0F0 ... ... ... ... 0B0 2F1 2B1 0F2 ... ... ... ... 0B2
        device 1 | ... 1F0 ... ... 1B0 1F1 ... ... 1B1 1F2 ... ... 1B2 ...
        device 2 | ... ... 2F0 2B0 0F1 ... ... ... ... 0B1 2F2 2B2 ... ...

    Placement: stages d and p-1-d on device d: even micro-batches go down the
        devices, odd ones up.
    Bubble: (p-1)(F+B+(m-1)max(F,B)) of a device idle in the step; equal stages,
        free links.
    Peak memory: 1 micro-batch activation on every device, beside weights twice.

    Args:
        devices: p, a stage of either direction on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Jain et al. 2020, GEMS, SC 2020. The order is derived from its figure in
        arXiv:2107.06925: a forward follows the backward of the other direction.
        With B = 2F and many micro-batches the fraction is theirs,
        (p-1)/(p+1/2).
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    every = np.arange(m)
    pipe_of = every % 2
    rows = []
    for d in range(p):
        stage = np.where(pipe_of == 0, d, p - 1 - d)
        rows.append(alternate(F(stage, every), B(stage, every)))
    return summed("gems", rows, m, pipe_of)


def chimera(devices: int, micro_batches: int) -> Schedule:
    """Two pipes in opposite directions fill each other's bubble.

    With p=4, m=4, every op one tick::

        device 0 | 0F0 0F2 ... 3F1 3B1 3F3 3B3 0B0 ... 0B2
        device 1 | ... 1F0 2F1 1F2 2F3 2B1 1B0 2B3 1B2 ...
        device 2 | ... 1F1 2F0 1F3 2F2 2B0 1B1 2B2 1B3 ...
        device 3 | 0F1 0F3 ... 3F0 3B0 3F2 3B2 0B1 ... 0B3

    Placement: stages d and p-1-d on device d: even micro-batches go down the
        devices, odd ones up.
    Bubble: (p-2)/(2m+p-2) of step time where F = B and p divides m; at B = 2F,
        (p-2)(1+m/p)F of a device idle, as units of p micro-batches are just
        concatenated; equal stages, free links. Otherwise at most what GPipe idles,
        (p-1)(F+B), for each unit.
    Peak memory: p/2+1 micro-batch activations on the outer devices, one more on
        each further in, up to p, where p divides m; beside weights twice.

    Args:
        devices: p, even, a stage of either direction on each.
        micro_batches: m, per step. What is left of the last p travels as the
            first of a unit do.

    Raises:
        ParameterError: a size below 1, or an odd number of devices.

    Source:
        Li and Hoefler 2021, arXiv:2107.06925, 3.1 and 3.5; direct concatenation.
        That residual micro-batches are scheduled so is from memory.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    even("chimera", devices=devices)
    p, m = devices, micro_batches
    every = np.arange(m)
    pipe_of = every % 2
    unit = 2 * p * (every // p) + every % p - pipe_of
    rows = []
    for d in range(p):
        stage = np.where(pipe_of == 0, d, p - 1 - d)
        slots = np.concatenate([unit + stage, unit + 2 * p - 1 - stage])
        both = F(stage, every) + B(stage, every)
        rows.append(both.take(np.argsort(slots)))
    return summed("chimera", rows, m, pipe_of)


def even(name: str, **sizes: int) -> None:
    """Refuse odd sizes.

    Raises:
        ParameterError: naming the first that is.
    """
    for what, size in sizes.items():
        if size % 2:
            raise ParameterError(
                f"{name} needs an even number of {what}, half for each direction, "
                f"got {size}"
            )


def summed(
    name: str, rows: Sequence[Ops], micro_batches: int, pipe_of: NDArray[np.int64]
) -> Schedule:
    """The schedule, with each stage's REDUCE behind its last backward on a device."""
    p = len(rows)
    reduced = [
        reduced_behind(row, {d, p - 1 - d} if 2 * d != p - 1 else ())
        for d, row in enumerate(rows)
    ]
    return Schedule.of(
        reduced,
        name=name,
        placement=Placement.bidirectional(p),
        micro_batches=micro_batches,
        pipe_of=pipe_of,
    )


def _chimera_holds(case: Case) -> bool:
    f, b = case.forward, case.backward
    return case.m % case.p == 0 and bool(b in (f, 2 * f))


def _chimera_idle(case: Case) -> Any:
    p, m, f = case.p, case.m, case.forward
    return (p - 2) * (f if case.backward == f else f * ratio(m + p, p))


GEMS = Row(
    name="gems",
    generator=gems,
    summary="the least activations; two replicas, hardly any parallelism",
    source="Jain et al. 2020, GEMS, SC 2020",
    constraints="none",
    bubble="(p-1)(2m+1)/((p-1)(2m+1)+3m)",
    peak="1",
    idle=lambda case: (
        (case.p - 1)
        * (
            case.forward
            + case.backward
            + (case.m - 1) * max(case.forward, case.backward)
        )
    ),
    peak_of=lambda case, d: 1,
    figure=Case(4, 4),
)


def _units_of_their_own(case: Case) -> Bounds:
    """At most what GPipe idles for p micro-batches, in each unit."""
    return 0, -(-case.m // case.p) * case.fill_drain


CHIMERA = Row(
    name="chimera",
    generator=chimera,
    summary="two replicas; half of 1F1B's bubble where m is about p",
    source="Li and Hoefler 2021, 2107.06925, 3.1",
    constraints="p even",
    bubble="(p-2)/(2m+p-2) at F=B",
    peak="p/2+1 outside to p inside",
    idle=_chimera_idle,
    peak_of=lambda case, d: case.p // 2 + 1 + min(d, case.p - 1 - d),
    holds=_chimera_holds,
    bounds=_units_of_their_own,
    allows=lambda case: case.p % 2 == 0,
    figure=Case(4, 4),
)
