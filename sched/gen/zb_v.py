"""V-shaped pipelines: device d holds stages d and 2p-1-d.

A micro-batch goes down the devices and comes up again, so the first device also
computes the loss and has the shortest and the longest wait between a forward and
its backward. Chunk 0 is the way down, chunk 1 the way up.
"""

from __future__ import annotations

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.ir import (
    F,
    I,
    Ops,
    Schedule,
    W,
    alternate,
)
from pipeproof.sched.placement import Placement
from pipeproof.sched.row import Row, at_most_fill_drain


def zb_v(devices: int, micro_batches: int) -> Schedule:
    """ZB-V: 1F1B's memory and, where F = I = W, no bubble inside a device's span.

    With p=2, m=3, every op one tick::

        device 0 | 0F0 0F1 0F2 3F0 3I0 3F1 3I1 ... 0I0 3F2 3I2 0I1 ... 0I2
        device 1 | ... 1F0 2F0 1F1 2F1 2I0 1F2 1I0 2F2 2I1 1I1 2I2 1I2 ...

    Placement: stages d and 2p-1-d on device d.
    Bubble: (p-1)(max(F,I)-W) idle in the longest device span, for m >= 2p-1,
        F <= I and 2W <= F+I; equal stages, free links. The step has in the mean
        (p-1)F/2 more where F = I = W, the skew between devices. Outside, at most
        GPipe's (p-1)(F+B); no formula is published there.
    Peak memory: p micro-batch activations on every device for m >= 2p-1.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step. Below 2p-1, the order for 2p-1 without the
            missing ones.

    Raises:
        ParameterError: either is below 1.

    Source:
        Qi et al. 2023, arXiv:2401.10241, section 6: the handcrafted order. Their
        search does better where F, I and W differ.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, max(micro_batches, 2 * devices - 1)
    rows = []
    for d in range(p):
        down, up = d, 2 * p - 1 - d
        first = 2 * (p - d) - 1
        both = m - first - d
        last = m - d
        row = Ops.of(
            [
                F(down, range(first)),
                alternate(F(up, range(d)), F(down, range(first, first + d))),
                alternate(F(up, range(d, p)), I(up, range(p - d)), W(up, range(p - d))),
                alternate(
                    F(down, range(first + d, m)),
                    I(down, range(both)),
                    W(down, range(both)),
                    F(up, range(p, p + both)),
                    I(up, range(p - d, p - d + both)),
                    W(up, range(p - d, p - d + both)),
                ),
                alternate(
                    I(down, range(both, m - p)),
                    W(down, range(both, m - p)),
                    F(up, range(p + both, m)),
                    I(up, range(p - d + both, last)),
                    W(up, range(p - d + both, last)),
                ),
                alternate(I(down, range(m - p, m - p + d)), I(up, range(last, m))),
                alternate(I(down, range(m - p + d, m)), W(down, range(m - p, m - d))),
                W(up, range(last, m)),
                W(down, range(m - d, m)),
            ]
        )
        rows.append([row.take(row.micro_batch < micro_batches)])
    return Schedule.of(rows, name="zb-v", placement=Placement.v(p))


ZB_V = Row(
    name="zb-v",
    generator=zb_v,
    summary="1F1B's memory without a bubble in a device's span; F, I, W alike",
    source="Qi et al. 2023, 2401.10241, 6",
    constraints="none",
    bubble="0 of a device's span at F=I=W",
    peak="p",
    idle=lambda case: (
        (case.p - 1) * (max(case.forward, case.input_grad) - case.weight_grad)
    ),
    peak_of=lambda case, d: case.p,
    idle_of="span",
    holds=lambda case: (
        case.m >= 2 * case.p - 1
        and bool(case.forward <= case.input_grad)
        and bool(2 * case.weight_grad <= case.forward + case.input_grad)
    ),
    bounds=at_most_fill_drain,
)
