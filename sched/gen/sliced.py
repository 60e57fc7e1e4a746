"""Pipelines whose unit is a slice of a micro-batch along the sequence.

Causal attention lets a stage take slice q as soon as it holds the keys and values
of the slices before it. Backwards run the slices in reverse, since the gradients
of those keys and values come from the slices behind.
"""

from __future__ import annotations

import numpy as np

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.ir import B, F, Ops, Schedule, alternate
from pipeproof.sched.row import Case, Row


def terapipe(devices: int, micro_batches: int, *, slices: int = 2) -> Schedule:
    """GPipe with slices for units: a shorter bubble, the same activations.

    With p=2, m=2, slices=2, every op one tick::

        device 0 | F0   F0.1 F1   F1.1 .... .... B1.1 B1   B0.1 B0
        device 1 | .... F0   F0.1 F1   F1.1 B1.1 B1   B0.1 B0   ....

    Placement: stage d on device d.
    Bubble: (p-1)/(qm+p-1) of step time; equal stages, slices that take equal
        time, free links.
    Peak memory: m micro-batch activations on every device.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.
        slices: q, parts of a micro-batch along the sequence.

    Raises:
        ParameterError: a size below 1.

    Source:
        Li et al. 2021, arXiv:2102.07988. They choose unequal slices that take
        equal time.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, slices=slices)
    p, m, n = devices, micro_batches, slices
    batch, part = np.divmod(np.arange(m * n), n)
    rows = [[F(d, batch, part), B(d, batch[::-1], part[::-1])] for d in range(p)]
    return Schedule.of(rows, name="terapipe", micro_batches=m, slices=n)


def seq1f1b(devices: int, micro_batches: int, *, slices: int = 2) -> Schedule:
    """1F1B with slices for units: a shorter bubble and fewer activations.

    With p=2, m=2, slices=2, every op one tick::

        device 0 | F0   F0.1 F1   .... B0.1 F1.1 B0   .... B1.1 B1
        device 1 | .... F0   F0.1 B0.1 F1   B0   F1.1 B1.1 B1   ....

    Placement: stage d on device d.
    Bubble: (p-1)/(qm+p-1) of step time; equal stages, slices that take equal
        time, free links.
    Peak memory: min(q+p-1-d, mq)/q micro-batch activations on device d.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.
        slices: q, parts of a micro-batch along the sequence.

    Raises:
        ParameterError: a size below 1.

    Source:
        Sun et al. 2024, arXiv:2406.03488. They choose unequal slices that take
        equal time.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, slices=slices)
    p, m, n = devices, micro_batches, slices
    rows = [[_one_by_one(d, m, n, p - 1 - d + n - 1)] for d in range(p)]
    return Schedule.of(rows, name="seq1f1b", micro_batches=m, slices=n)


def slimpipe(devices: int, micro_batches: int, *, slices: int = 2) -> Schedule:
    """Eager 1F1B with slices for units: links have time to deliver.

    With p=2, m=2, slices=2, every op one tick::

        device 0 | F0   F0.1 F1   F1.1 B0.1 .... B0   .... B1.1 B1
        device 1 | .... F0   F0.1 B0.1 F1   B0   F1.1 B1.1 B1   ....

    Placement: stage d on device d.
    Bubble: (p-1)/(qm+p-1) of step time; equal stages, slices that take equal
        time, free links.
    Peak memory: min(q+2(p-1-d), mq)/q micro-batch activations on device d.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.
        slices: q, parts of a micro-batch along the sequence.

    Raises:
        ParameterError: a size below 1.

    Source:
        SlimPipe 2025, arXiv:2504.14519, without interleaving. Their slices are
        equal in tokens, and devices exchange attention work to take equal time;
        the exchange is not modelled.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, slices=slices)
    p, m, n = devices, micro_batches, slices
    rows = [[_one_by_one(d, m, n, 2 * (p - 1 - d) + n - 1)] for d in range(p)]
    return Schedule.of(rows, name="slimpipe", micro_batches=m, slices=n)


def _one_by_one(d: int, m: int, n: int, warmup: int) -> Ops:
    """A device's row: forwards by slice, then one F, one B, in turn."""
    units = m * n
    warmup = min(warmup, units)
    steady = units - warmup
    batch, part = np.divmod(np.arange(units), n)
    forward, backward = F(d, batch, part), B(d, batch, n - 1 - part)
    return Ops.of(
        [
            forward[:warmup],
            alternate(forward[warmup:], backward[:steady]),
            backward[steady:],
        ]
    )


def _slices(case: Case) -> int:
    return int(case.options.get("slices", 2))


def _sliced_idle(case: Case) -> Number:
    return ratio(case.fill_drain, _slices(case))


TERAPIPE = Row(
    name="terapipe",
    generator=terapipe,
    summary="long sequences: GPipe's bubble divided by the slices",
    source="Li et al. 2021, 2102.07988",
    constraints="none",
    bubble="(p-1)/(qm+p-1)",
    peak="m",
    idle=_sliced_idle,
    peak_of=lambda case, d: case.m,
    figure=Case(4, 2, {"slices": 4}),
)

SEQ1F1B = Row(
    name="seq1f1b",
    generator=seq1f1b,
    summary="long sequences: 1F1B's bubble and activations divided by slices",
    source="Sun et al. 2024, 2406.03488",
    constraints="none",
    bubble="(p-1)/(qm+p-1)",
    peak="min(q+p-1-d, mq)/q",
    idle=_sliced_idle,
    peak_of=lambda case, d: ratio(
        min(_slices(case) + case.p - 1 - d, case.m * _slices(case)),
        _slices(case),
    ),
    figure=Case(4, 4),
)

SLIMPIPE = Row(
    name="slimpipe",
    generator=slimpipe,
    summary="as seq1f1b, where links are slow",
    source="SlimPipe 2025, 2504.14519",
    constraints="none",
    bubble="(p-1)/(qm+p-1)",
    peak="min(q+2(p-1-d), mq)/q",
    idle=_sliced_idle,
    peak_of=lambda case, d: ratio(
        min(_slices(case) + 2 * (case.p - 1 - d), case.m * _slices(case)),
        _slices(case),
    ),
    figure=Case(4, 2, {"slices": 4}),
)
