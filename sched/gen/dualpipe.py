"""DualPipe: forwards and backwards of two ways overlap on each device.

The two ways are two directions, each with a replica of the weights, or the way down
a V and the way up: that is DualPipe cut in half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import ratio
from pipeproof.sched.gen.bidirectional import even, summed
from pipeproof.sched.ir import B, F, I, Ops, Schedule, W, alternate
from pipeproof.sched.placement import Placement
from pipeproof.sched.row import Case, Row, at_most_fill_drain


def dualpipe(devices: int, micro_batches: int) -> Schedule:
    """Two directions, in which forwards and backwards of each overlap.

    With p=2, m=4, every op one tick::

        device 0 | 0F0     1F2     0F1     1B2     1F3&0B0 ------- 1B3     0I1
        device 1 | 0F2     1F0     0F3     1B0     1F1&0B2 ------- 1B1     0I3

    Placement: stages d and p-1-d on device d: the first half of the micro-batches
        goes down the devices, the second up.
    Bubble: (p/2-1)(F&B+B-3W) idle in the step on the device that idles most,
        where F = I, W <= F and F&B, the joint time, lies in max(F,B) ... F+B;
        equal stages, free links. At other times at most GPipe's (p-1)(F+B).
    Peak memory: p+1 micro-batch activations on every device, beside weights twice.

    Args:
        devices: p, even, a stage of either direction on each.
        micro_batches: m, per step, even, at least 2p.

    Raises:
        ParameterError: a size below 1 or odd, or fewer than 2p micro-batches.

    Source:
        DeepSeek-AI 2024, arXiv:2412.19437, 3.2.1; the eight parts of
        github.com/deepseek-ai/DualPipe. The paper states the bubble without the
        conditions; outside them it is another.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    even("dualpipe", devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    if m < 2 * p:
        raise ParameterError(
            f"dualpipe needs at least two micro-batches for each device, {2 * p} for "
            f"{p} devices, got {m}"
        )
    pipe_of = np.repeat([0, 1], m // 2)
    rows = []
    for d in range(p):
        ways = [
            Way(stage, np.flatnonzero(pipe_of == pipe))
            for pipe, stage in enumerate((d, p - 1 - d))
        ]
        near, far = ways if d < p // 2 else ways[::-1]
        rows.append(eight_parts(p // 2, near, far))
    return summed("dualpipe", rows, m, pipe_of)


def dualpipe_v(devices: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half: one replica of the weights, on half of the devices.

    With p=1, m=2, every op one tick::

        device 0 | 0F0     1F0     0F1     1B0     1F1&0B0 ------- 1B1     0I1

    Placement: stages d and 2p-1-d on device d.
    Bubble: (p-1)(F&B+B-3W)/2 idle in the step on the device that idles most,
        where F = I, W <= F and F&B, the joint time, lies in max(F,B) ... F+B;
        equal stages, free links. At other times at most GPipe's (p-1)(F+B).
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


Builder = Callable[[int, NDArray[np.int64]], Ops]


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


def _dualpipe_idle(case: Case) -> Any:
    """F&B + B - 3W, for each pair of devices that a direction passes."""
    return case.joint + case.backward - 3 * case.weight_grad


def _dualpipe_holds(case: Case) -> bool:
    f, w, b = case.forward, case.weight_grad, case.backward
    return bool(f == case.input_grad and w <= f and max(f, b) <= case.joint <= f + b)


DUALPIPE = Row(
    name="dualpipe",
    generator=dualpipe,
    summary="two replicas; hides communication behind the other direction",
    source="DeepSeek-AI 2024, 2412.19437, 3.2.1",
    constraints="p and m even, m >= 2p",
    bubble="(p-2)/(3m+p-2)",
    peak="p+1",
    idle=lambda case: ratio((case.p - 2) * _dualpipe_idle(case), 2),
    peak_of=lambda case, d: case.p + 1,
    idle_of="most",
    holds=_dualpipe_holds,
    bounds=at_most_fill_drain,
    allows=lambda case: case.p % 2 == 0 and case.m % 2 == 0 and case.m >= 2 * case.p,
    figure=Case(8, 20),
)

DUALPIPE_V = Row(
    name="dualpipe-v",
    generator=dualpipe_v,
    summary="hides communication behind the other chunk's computation",
    source="DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe",
    constraints="m >= 2p",
    bubble="(p-1)/(3m+p-1)",
    peak="p+1/2",
    idle=lambda case: ratio((case.p - 1) * _dualpipe_idle(case), 2),
    peak_of=lambda case, d: ratio(2 * case.p + 1, 2),
    idle_of="most",
    holds=_dualpipe_holds,
    bounds=at_most_fill_drain,
    allows=lambda case: case.m >= 2 * case.p,
    figure=Case(4, 10),
)
