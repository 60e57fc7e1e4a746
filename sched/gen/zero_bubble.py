"""Zero bubble, by hand: weight gradients wait until a device has nothing else."""

from __future__ import annotations

from typing import Any

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.ir import F, I, Ops, Schedule, W, alternate
from pipeproof.sched.row import Case, Row, at_most_fill_drain


def zb_h1(devices: int, micro_batches: int) -> Schedule:
    """A third of 1F1B's bubble at the same peak on the first device.

    The drain is filled with W that waited; device d lets d of them wait.

    With p=2, m=3, every op one tick::

        device 0 | F0 F1 .. I0 F2 I1 .. I2
        device 1 | .. F0 I0 F1 I1 F2 I2 ..

    W takes no time in this picture.

    Placement: stage d on device d.
    Bubble: (p-1)max(F, I, F+I-W) of a device idle in the step, for m >= p; equal
        stages, free links. At F=I=W that is (p-1)/(3m+p-1) of step time, and a
        smaller m idles p-m ticks more.
    Peak memory: min(p, m) micro-batch activations on every device, each held
        until its W.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Qi et al. 2023, arXiv:2401.10241. They count the
        cost in the longest span of a device: `span_bubble`. The order below p
        micro-batches is ours: the same rule, cut short.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    rows = [[_handcrafted(d, m, warmup=p - 1 - d, lag=d)] for d in range(p)]
    return Schedule.of(rows, name="zb-h1")


def zb_h2(devices: int, micro_batches: int) -> Schedule:
    """No bubble inside any device's span, for twice the activations.

    More forwards fill the pipeline than in ZB-H1; 2d W of device d wait for its
    drain.

    With p=2, m=3, every op one tick::

        device 0 | F0 F1 F2 I0 .. I1 .. I2
        device 1 | .. F0 I0 F1 I1 F2 I2 ..

    W takes no time in this picture; with a tick each, no device would idle
    between its first op and its last.

    Placement: stage d on device d.
    Bubble: (p-1)max(0, F+I-2W, I-F) idle in the longest span of a device, for
        m >= 2p-1; equal stages, free links. At F=I=W that is 0, and a smaller m
        idles 2p-1-m ticks. The step itself keeps at least the skew of (p-1)F
        between the devices, unless steps overlap.
    Peak memory: min(2p-1, m) micro-batch activations on every device, each held
        until its W.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Qi et al. 2023, arXiv:2401.10241. The order below
        2p-1 micro-batches is ours: the same rule, cut short.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    rows = [[_handcrafted(d, m, warmup=2 * (p - 1 - d), lag=2 * d)] for d in range(p)]
    return Schedule.of(rows, name="zb-h2")


def _handcrafted(d: int, m: int, *, warmup: int, lag: int) -> Ops:
    """A device's row: W i behind I i + lag, as late as its memory allows.

    Args:
        d: the device and its stage.
        m: micro-batches.
        warmup: forwards ahead of the first I.
        lag: input gradients that may lie ahead of their W.
    """
    ahead = min(warmup, m)
    steady = m - ahead
    full = min(lag, steady)  # from here on, a forward needs the room of a W
    done = steady - full
    return Ops.of(
        [
            F(d, range(ahead)),
            alternate(F(d, range(ahead, ahead + full)), I(d, range(full))),
            alternate(
                F(d, range(ahead + full, m)),
                I(d, range(full, steady)),
                W(d, range(done)),
            ),
            alternate(I(d, range(steady, m)), W(d, range(done, done + ahead))),
            W(d, range(done + ahead, m)),
        ]
    )


def _zb_h1_idle(case: Case) -> Any:
    f, i, w = case.times
    return (case.p - 1) * max(f, i, f + i - w) + max(case.p - case.m, 0) * f


def _zb_h2_idle(case: Case) -> Any:
    f, i, w = case.times
    missing = max(2 * case.p - 1 - case.m, 0)
    return (case.p - 1) * max(0, f + i - 2 * w, i - f) + missing * f


ZB_H1 = Row(
    name="zb-h1",
    generator=zb_h1,
    summary="a third of 1F1B's bubble, at the peak of its first device",
    source="Qi et al. 2023, 2401.10241",
    constraints="none",
    bubble="(p-1)/(3m+p-1), m >= p",
    peak="min(p, m)",
    idle=_zb_h1_idle,
    peak_of=lambda case, d: min(case.p, case.m),
    holds=lambda case: case.m >= case.p or case.equal_times,
    bounds=at_most_fill_drain,
)

ZB_H2 = Row(
    name="zb-h2",
    generator=zb_h2,
    summary="no bubble in a device's span, for twice 1F1B's activations",
    source="Qi et al. 2023, 2401.10241",
    constraints="none",
    bubble="0 of a device's span at F=I=W, m >= 2p-1",
    peak="min(2p-1, m)",
    idle=_zb_h2_idle,
    peak_of=lambda case, d: min(2 * case.p - 1, case.m),
    idle_of="span",
    holds=lambda case: case.m >= 2 * case.p - 1 or case.equal_times,
    bounds=at_most_fill_drain,
)
