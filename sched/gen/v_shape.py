"""V-shaped pipelines: device d holds stages d and 2p-1-d.

A micro-batch goes down the devices and comes up again, so the first device also
computes the loss and has the shortest and the longest wait between a forward and
its backward. Chunk 0 is the way down, chunk 1 the way up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
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


def v_half(devices: int, micro_batches: int) -> Schedule:
    """Half of 1F1B's activations, for a bubble shorter than 1F1B's.

    With p=2, m=3, every op one tick::

        device 0 | 0F0 0F1 0F2 3F0 3I0 3F1 3I1 ... ... 3F2 3I2 0I0 0I1 0I2
        device 1 | ... 1F0 2F0 1F1 2F1 2I0 1I0 1F2 2F2 2I1 1I1 2I2 1I2 ...

    Placement: stages d and 2p-1-d on device d.
    Bubble: (3p-7)F/2 of a device idle in the step for even p, (3p-4)F/2 for odd
        p; F = I = W, p >= 3, m >= 2p, free links. Where times differ it grows
        with m.
    Peak memory: floor(p/2)+1 micro-batch activations, 2 floor(p/2)+2 chunks, on
        every device; less only where m is small.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Qi et al. 2024, arXiv:2405.15362. The paper gives the building block and
        names the squeeze; its rules follow the authors' code, re-derived, with W
        refilled in the order of their I. The formula of the idle time is derived
        from simulation, p = 3 to 24.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p = devices
    lag = 0 if p % 2 else 3
    block = [
        (2 * d, 3 * p - d - 2, 3 * p + lag + 2 * d - 1, 6 * p + lag - d - 2)
        for d in range(p)
    ]
    return _from_block("v-half", block, micro_batches)


def v_min(devices: int, micro_batches: int) -> Schedule:
    """A third of 1F1B's activations, for a bubble no longer than 1F1B's.

    With p=2, m=3, every op one tick::

        device 0 | 0F0 0F1 ... 3F0 3I0 ... ... 0I0 ... 3F1 3I1 0F2 ... 0I1 ... 3F2 3I2 ... ... 0I2
        device 1 | ... 1F0 2F0 ... ... 2I0 1I0 1F1 2F1 ... ... 2I1 1I1 1F2 2F2 ... ... 2I2 1I2 ...

    Placement: stages d and 2p-1-d on device d.
    Bubble: (4p-5)F/2 of a device idle in the step, (4p-7)F/2 where 3 divides p;
        F = I = W, p >= 2, m >= 2p, free links. Where times differ it grows with m.
    Peak memory: floor((p+4)/3) micro-batch activations, 2 floor((p+4)/3) chunks;
        one chunk less on device 0 where p mod 3 is 2.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Qi et al. 2024, arXiv:2405.15362. Squeezed as V-Half; the formula of the
        idle time is derived from simulation, p = 2 to 24.
    """  # noqa: E501
    at_least_one(devices=devices, micro_batches=micro_batches)
    p = devices
    lag = 0 if p % 3 else 2
    block = [(d, 2 * p - d - 1, 2 * p + lag + d, 4 * p + lag - d - 1) for d in range(p)]
    return _from_block("v-min", block, micro_batches)


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
Slots = NDArray[np.int64]
Row = list[Slots]
"""Slots of a device's F₀, F₁, I₁ and I₀, each by micro-batch; of all its W, if any."""

DOWN, UP = (0, 2), (1, 3)
"""Parts of a row that wait for the device above, and for the one below."""

PERIOD = 6
"""Slots of a building block: F, I and W of two chunks."""


def _from_block(
    name: str, block: Sequence[tuple[int, int, int, int]], micro_batches: int
) -> Schedule:
    """Stamp a building block for each micro-batch, squeeze, refill W.

    Args:
        name: of the schedule.
        block: for each device, the slots of its F₀, F₁, I₁ and I₀.
        micro_batches: m; one block each, six slots apart.
    """
    stamps = PERIOD * np.arange(micro_batches)
    rows = [[slot + stamps for slot in slots] for slots in block]
    rows = [[*row, _gaps(row)] for row in rows]
    cap = max(map(_most_alive, rows))
    _squeeze(rows, cap)
    rows = [row[:4] for row in _closed_up(rows)]
    _squeeze(rows, cap)
    p = len(rows)
    return Schedule.of(
        [[_listed(row, d, 2 * p - 1 - d)] for d, row in enumerate(rows)],
        name=name,
        placement=Placement.v(p),
    )


def _gaps(row: Row) -> Slots:
    """Slots for a device's W: each the first free one behind the next I."""
    taken = set(np.concatenate(row[:4]).tolist())
    result: list[int] = []
    free = 0
    for ready in np.sort(np.concatenate(row[2:4])).tolist():
        free = max(free, ready + 1)
        while free in taken:
            free += 1
        result.append(free)
        free += 1
    return np.array(result)


def _most_alive(row: Row) -> int:
    """The most chunks of activations alive at once, each from its F to its W."""
    weights = row[4] if len(row) > 4 else _gaps(row)
    size = int(max(row[3][-1], weights[-1])) + 1
    change = np.bincount(np.concatenate(row[:2]), minlength=size)
    change -= np.bincount(weights, minlength=size)
    return int(np.cumsum(change).max())


def _in_order(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    """(slot, device, part, number) of everything, by slot."""
    return sorted(
        (slot, d, part, i)
        for d, row in enumerate(rows)
        for part, slots in enumerate(row)
        for i, slot in enumerate(slots.tolist())
    )


def _ready(rows: Sequence[Row], d: int, part: int, i: int) -> int:
    """The first slot at which all that an op needs is done."""
    row = rows[d]
    needs = []
    if part in DOWN and d > 0:
        needs.append(rows[d - 1][part][i])
    if part in UP and d + 1 < len(rows):
        needs.append(rows[d + 1][part][i])
    if 0 < part < 4:
        needs.append(row[part - 1][i])
    if part == 4:
        needs.append(np.sort(np.concatenate(row[2:4]))[i])
    if i > 0:
        needs.append(row[part][i - 1])
    return int(max(needs, default=-1)) + 1


def _squeeze(rows: Sequence[Row], cap: int) -> None:
    """Move what is outside the steady state ahead, within the cap on memory.

    Where W have slots of their own, they move like the others, before and behind
    the steady state; where they just fill gaps, only what is behind it moves.
    """
    ops = _in_order(rows)
    last = len(rows[0][0]) - 1
    first_back, last_forward = (
        ops.index((int(rows[0][part][i]), 0, part, i))
        for part, i in ((3, 0), (0, last))
    )
    begin = first_back if len(rows[0]) > 4 else 0
    steady = range(begin, max(first_back, last_forward) + 1)
    taken: list[set[int]] = [set() for _ in rows]
    for place, (slot, d, part, i) in enumerate(ops):
        if place not in steady:
            ready = _ready(rows, d, part, i)
            free = [other for other in range(ready, slot) if other not in taken[d]]
            slot = _earliest(rows[d], part, i, [*free, slot], cap)
        rows[d][part][i] = slot
        taken[d].add(slot)


def _earliest(row: Row, part: int, i: int, slots: Sequence[int], cap: int) -> int:
    """The first of these slots that keeps the cap; the last one does."""

    def keeps(slot: int) -> bool:
        row[part][i] = slot
        return _most_alive(row) <= cap

    return slots[min(bisect_left(slots[:-1], True, key=keeps), len(slots) - 1)]


def _closed_up(rows: Sequence[Row]) -> list[Row]:
    """The same order on each device, every op as early as one slot each allows."""
    result = [[slots.copy() for slots in row] for row in rows]
    free = [0] * len(rows)
    for _, d, part, i in _in_order(rows):
        slot = max(free[d], _ready(result, d, part, i))
        result[d][part][i] = slot
        free[d] = slot + 1
    return result


def _listed(row: Row, down: int, up: int) -> Ops:
    """A device's ops in order of their slots, W where they fill the gaps."""
    every = np.arange(len(row[0]))
    moves = Ops.of([F(down, every), F(up, every), I(up, every), I(down, every)])
    slots = np.concatenate(row)
    back = np.argsort(np.concatenate(row[2:4]))
    weights = W(np.repeat([up, down], len(every)), np.tile(every, 2)).take(back)
    ops = moves + weights
    return ops.take(np.argsort(np.concatenate([slots, _gaps(row)])))
