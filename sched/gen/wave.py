"""Waves: a micro-batch passes down and up the devices several times."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from heapq import heappop, heappush

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.exact import ratio
from pipeproof.sched.ir import Kind, Op, Schedule
from pipeproof.sched.placement import Placement
from pipeproof.sched.row import Bounds, Case, Row


def hanayo(devices: int, micro_batches: int, *, waves: int = 1) -> Schedule:
    """Down and up the devices in waves: Chimera's overlap without a second replica.

    With p=3, m=3, every op one tick::

        device 0 | 0F0 0F1 0F2 ... ... 5F0 5B0 5F1 5B1 5F2 5B2 0B0 ... 0B1 ... 0B2
        device 1 | ... 1F0 1F1 1F2 4F0 ... 4F1 4B0 4F2 4B1 1B0 4B2 1B1 ... 1B2 ...
        device 2 | ... ... 2F0 3F0 2F1 3F1 2F2 3F2 3B0 2B0 3B1 2B1 3B2 2B2 ... ...

    Placement: 2 waves p stages, down the devices and up again in each wave.
    Bubble: ((p-1)(F+B)-(m-1)F) of a device idle in the step for one wave, m <= p
        and B >= 2F; equal stages, free links. At m = p and B = 2F the fraction is
        (2p-2)/(5p-2), which is less than the published (2p-2)/(3pw+p-1). So it is
        with two and three waves, for p up to 16; with four and five the step is up
        to 0.6 % longer than published. At any times, at most
        (p-1)(F+B)+(m-1)max(F,B).
    Peak memory: (m+min(m, floor(3d/2)+1))/2 micro-batch activations on device d,
        likewise.

    Args:
        devices: p.
        micro_batches: m, per step.
        waves: w; each device holds 2w stages.

    Raises:
        ParameterError: one is below 1.

    Source:
        Liu et al. 2023, arXiv:2308.15762. The paper draws its order and gives no
        rule; this one is derived: every device runs a backward as soon as one is
        ready, and of the rest what is furthest on its way, at B = 2F.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, waves=waves)
    placement = Placement.wave(devices, waves)
    rows = _backward_first(placement, micro_batches)
    return Schedule.of(rows, name="hanayo", placement=placement)


SLOTS = {Kind.F: 1, Kind.B: 2}
"""What the order is made for: a backward takes twice a forward."""


def _backward_first(placement: Placement, micro_batches: int) -> list[list[Op]]:
    """Each device always runs what is ready: a backward, if one is.

    Of several, that of the lowest micro-batch; of those, that of the latest stage.
    """
    (home,) = placement.pipes
    devices = range(placement.devices)
    last = len(home) - 1
    rows: list[list[Op]] = [[] for _ in devices]
    ready: list[list[tuple[bool, int, int]]] = [[] for _ in devices]
    busy_until = [0] * len(rows)
    ending: defaultdict[int, list[Op]] = defaultdict(list)
    for number in range(micro_batches):
        heappush(ready[home[0]], (True, number, 0))
    left = 2 * len(home) * micro_batches
    slot = 0
    while left:
        for kind, stage, number, _ in ending.pop(slot, ()):
            forward = kind == Kind.F and stage < last
            follows = stage + 1 if forward else stage - (kind == Kind.B)
            if follows >= 0:
                heappush(ready[home[follows]], (forward, number, -follows))
        for device in devices:
            if busy_until[device] <= slot and ready[device]:
                forward, number, stage = heappop(ready[device])
                op = Op(Kind.F if forward else Kind.B, -stage, number)
                rows[device].append(op)
                busy_until[device] = slot + SLOTS[op.kind]
                ending[busy_until[device]].append(op)
                left -= 1
        slot += 1
    return rows


def _waves(case: Case) -> int:
    return int(case.options.get("waves", 1))


def _hanayo_bounds(case: Case) -> Bounds:
    """The published idle time at most, where it is stated and reached."""
    p, w = case.p, _waves(case)
    if case.m == p and case.backward == 2 * case.forward and w <= 3:
        fraction = Fraction(2 * p - 2, 3 * p * w + p - 1)
        return 0, case.ideal * fraction / (1 - fraction)
    longer = max(case.forward, case.backward)
    return 0, case.fill_drain + (case.m - 1) * longer


HANAYO = Row(
    name="hanayo",
    generator=hanayo,
    summary="Chimera's overlap with one replica, for m up to p",
    source="Liu et al. 2023, 2308.15762",
    constraints="none",
    bubble="(3p-m-2)/(2m+3p-2), m <= p, one wave",
    peak="(m+min(m, floor(3d/2)+1))/2",
    idle=lambda case: (
        (case.p - 1) * (case.forward + case.backward) - (case.m - 1) * case.forward
    ),
    peak_of=lambda case, d: ratio(case.m + min(case.m, 3 * d // 2 + 1), 2),
    holds=lambda case: (
        case.m <= case.p
        and _waves(case) == 1
        and bool(case.backward >= 2 * case.forward)
    ),
    bounds=_hanayo_bounds,
    figure=Case(4, 4),
)
