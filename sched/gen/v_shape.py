"""V-shaped pipelines: device d holds stages d and 2p-1-d.

A micro-batch goes down the devices and comes up again, so the first device also
computes the loss and has the shortest and the longest wait between a forward and
its backward. Chunk 0 is the way down, chunk 1 the way up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.ir import (
    B,
    F,
    I,
    Ops,
    Schedule,
    W,
    alternate,
)
from pipeproof.sched.placement import Placement


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


def dualpipe_v(devices: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half: one replica of the weights, on half of the devices.

    With p=1, m=2, every op one tick::

        device 0 | 0F0     1F0     0F1     1B0     1F1&0B0 ------- 1B1     0I1

    Placement: stages d and 2p-1-d on device d.
    Bubble: (p-1)(F&B+B-3W)/2 idle in the step on the device that idles most,
        where F = I, W <= F and F&B, the joint time, lies in max(F,B) ... F+B;
        equal stages, free links.
    Peak memory: p + 1/2 micro-batch activations, 2p+1 chunks, on every device.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step, at least 2p.

    Raises:
        ParameterError: a size below 1, or fewer than 2p micro-batches.

    Source:
        DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe (DualPipeV), after a
        post by Sea AI Lab. The formula is that of DualPipe for 2p devices, in
        chunks, and tested; none is published with these conditions.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    if m < 2 * p:
        raise ParameterError(
            f"dualpipe-v needs at least two micro-batches for each device, {2 * p} for "
            f"{p} devices, got {m}"
        )
    every = np.arange(m)
    rows = [
        [eight_parts(p, Way(d, every), Way(2 * p - 1 - d, every))] for d in range(p)
    ]
    return Schedule.of(rows, name="dualpipe-v", placement=Placement.v(p))


class Way(NamedTuple):
    """One of the two ways on which micro-batches pass a device of DualPipe.

    Attributes:
        stage: that the device holds on this way.
        numbers: int64, the micro-batches that take it, in order.
    """

    stage: int
    numbers: NDArray[np.int64]

    def run(self, builder: Builder, first: int, last: int) -> Ops:
        """The ops of the micro-batches from the first one up to the last."""
        return builder(self.stage, self.numbers[first:last])


def eight_parts(p: int, near: Way, far: Way) -> Ops:
    """One device's row of DualPipe, in the eight parts of its authors' code.

    Args:
        p: devices that a way passes before it turns, half of it.
        near: the way on which the device is among the first p.
        far: the one on which it is as far from the end.
    """
    d, m = near.stage, len(near.numbers)
    k, n = p - 1 - d, m - 2 * p + d + 1
    steady = alternate(
        near.run(F, 2 * k + d + 1, m),
        far.run(B, k, k + n),
        far.run(F, p, p + n),
        near.run(B, 0, n),
    )
    paired = np.tile([False, True, False, True], n)
    if k == 0:  # the first backward needs the forward just ahead of it
        paired[1] = False
    drain = alternate(
        far.run(B, k + n, 2 * k + n), far.run(F, p + n, m), near.run(B, n, n + k)
    )
    back = alternate(far.run(B, m - d - 1, m), near.run(B, n + k, m - k))
    late = back[d + 1 :]
    last = near.run(I, m - k, m)
    weights = W(
        np.append(late.stage, last.stage), np.append(late.micro_batch, last.micro_batch)
    )
    return Ops.of(
        [
            near.run(F, 0, 2 * k),
            alternate(near.run(F, 2 * k, 2 * k + d + 1), far.run(F, 0, d + 1)),
            alternate(far.run(I, 0, k), far.run(W, 0, k), far.run(F, d + 1, p)),
            steady.grouped(paired),
            drain.grouped(np.tile([False, False, True], k)),
            back[: d + 1],
            I(late.stage, late.micro_batch),
            alternate(weights[:k], last),
            weights[k:],
        ]
    )


Builder = Callable[[int, NDArray[np.int64]], Ops]
