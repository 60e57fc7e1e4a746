"""V-Half and V-Min: pipelines on a V with controllable memory.

Both repeat a building block, the ops of one micro-batch, once every 2(F+I+W), in
the times of a chunk. The shorter its activations live, the fewer of them overlap.

The published blocks are laid in slots as long as the longest of F, I and W. Where
these differ, some devices' orders wait for each other in a circle, and every round
costs idle time. For given times this module lays blocks without such a circle. In
the steady state a device follows one of these rounds; chunk 0 is the way down the
devices, chunk 1 the way up::

    A   F0 F1 I1 I0 W  W     then B, which starts its round when A does
    B   F1 F0 I0 I1 W  W     then A, 2 max(F,I) later, or C, 2F later
    C   F0 W  I1 F1 W  I0    then A, W+I-F later

From A to B no op waits. `A B A B …` has no circle wherever |F-I| <= W, and the
activations of V-Half: from B to A, each chunk waits 2W, and nowhere else.
`A B C A …` has none wherever W >= 2 max(F,I) - min(F,I), and those of V-Min.
Where W is shorter the block is laid for a W that is not, and idles by twice what is
missing for each micro-batch.

No order needs less than its activations live. On device d those of chunk 0 live for
(2p-d)(F+I)+W at least and those of chunk 1 for (d+1)(F+I)+W, together (2p+1)(F+I)+2W
on any device; c at once have c times the length of the step to do it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, is_number, ratio
from pipeproof.sched.gen.squeeze import (
    DOWN,
    F0,
    F1,
    I0,
    I1,
    WEIGHT,
    Block,
    Timetable,
)
from pipeproof.sched.ir import Schedule
from pipeproof.sched.row import Bounds, Case, Row

Times = tuple[Number, Number, Number]


def v_half(devices: int, micro_batches: int, *, times: Times | None = None) -> Schedule:
    """Half of 1F1B's activations, for a bubble shorter than 1F1B's.

    With p=2, m=3, every op one tick::

        device 0 | 0F0 0F1 0F2 3F0 3I0 3F1 3I1 ... ... 3F2 3I2 0I0 0I1 0I2
        device 1 | ... 1F0 2F0 1F1 2F1 2I0 1I0 1F2 2F2 2I1 1I1 2I2 1I2 ...

    Placement: stages d and 2p-1-d on device d.
    Bubble: (3p-7)F/2 of a device idle in the step for even p, (3p-4)F/2 for odd
        p; F = I = W, p >= 3, m >= 2p, free links. Published order: it does not
        grow with m where 2|F-I| <= W, else by |F-I|-W/2 for each micro-batch; beside
        that, it is at most p(F+I+W).
        With `times`: at most p(F+I+W) for any m where |F-I| <= W, else by |F-I|-W
        more for each micro-batch; never more than published.
    Peak memory: floor(p/2)+1 micro-batch activations, 2 floor(p/2)+2 chunks, on
        every device; less only where m is small. With `times` no more.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step.
        times: of F, I and W, in any unit, that the order is built for; None for
            the published order.

    Raises:
        ParameterError: a size below 1, or times that are not three finite numbers
            above 0.

    Source:
        Qi et al. 2024, arXiv:2405.15362. The paper gives the building block and
        names the squeeze; its rules follow the authors' code, re-derived, with W
        refilled in the order of their I. The formula of the idle time is derived
        from simulation, p = 3 to 24. The blocks for given times are ours.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p = devices
    lag = 0 if p % 2 else 3
    starts = tuple(
        (2 * d, 3 * p - d - 2, 3 * p + lag + 2 * d - 1, 6 * p + lag - d - 2)
        for d in range(p)
    )
    return _best(starts, micro_batches, times).schedule("v-half")


def v_min(devices: int, micro_batches: int, *, times: Times | None = None) -> Schedule:
    """A third of 1F1B's activations, for a bubble no longer than 1F1B's.

    With p=2, m=3, every op one tick::

        device 0 | 0F0 0F1 ... 3F0 3I0 ... ... 0I0 ... 3F1 3I1 0F2 ... 0I1 ... 3F2 3I2 ... ... 0I2
        device 1 | ... 1F0 2F0 ... ... 2I0 1I0 1F1 2F1 ... ... 2I1 1I1 1F2 2F2 ... ... 2I2 1I2 ...

    Placement: stages d and 2p-1-d on device d.
    Bubble: (4p-5)F/2 of a device idle in the step, (4p-7)F/2 where 3 divides p;
        F = I = W, p >= 2, m >= 2p, free links. For p >= 3 it grows with m where W <
        2 max(F,I) - min(F,I), by what is missing for each micro-batch; beside that,
        it is at most p(F+I+W). Much of that growth
        is the memory's price: with c chunks of activations no order takes less than
        m((2p+1)(F+I)+2W)/2c, which for F = I >= W and large p is what this takes.
        With `times` never more than published; V-Half's law where p <= 3 or p = 5,
        whose memory has room for its block.
    Peak memory: floor((p+4)/3) micro-batch activations, 2 floor((p+4)/3) chunks;
        one chunk less on device 0 where p mod 3 is 2. With `times` no device has
        more than the most.

    Args:
        devices: p, two stages on each.
        micro_batches: m, per step.
        times: of F, I and W, in any unit, that the order is built for; None for
            the published order.

    Raises:
        ParameterError: a size below 1, or times that are not three finite numbers
            above 0.

    Source:
        Qi et al. 2024, arXiv:2405.15362. Squeezed as V-Half; the formula of the
        idle time is derived from simulation, p = 2 to 24.
    """  # noqa: E501
    at_least_one(devices=devices, micro_batches=micro_batches)
    p = devices
    lag = 0 if p % 3 else 2
    starts = tuple(
        (d, 2 * p - d - 1, 2 * p + lag + d, 4 * p + lag - d - 1) for d in range(p)
    )
    return _best(starts, micro_batches, times).schedule("v-min")


A = (F0, F1, I1, I0, WEIGHT, WEIGHT)
B = (F1, F0, I0, I1, WEIGHT, WEIGHT)
C = (F0, WEIGHT, I1, F1, WEIGHT, I0)


def _best(
    starts: tuple[tuple[int, ...], ...],
    micro_batches: int,
    times: Times | None,
) -> Timetable:
    """The published block, in slots; or for given times whichever ends first."""
    stamped = Block(starts, 6, (1, 1, 1)).stamped(micro_batches)
    cap = stamped.peak
    published = stamped.squeezed(cap)
    if times is None:
        return published
    whole = _whole(times)
    others = [
        block.stamped(micro_batches).closed_up(whole)
        for block in _blocks(len(starts), *whole)
    ]
    fitting = [other.filled().squeezed(cap) for other in others if other.peak <= cap]
    return min([published, *fitting], key=lambda table: table.closed_up(whole).end)


def _whole(times: Times) -> tuple[int, int, int]:
    """The same ratio in integers."""
    three = isinstance(times, Sequence) and len(times) == 3
    if not three or not all(is_number(time) and 0 < time < math.inf for time in times):
        raise ParameterError(
            f"times must be three finite numbers above 0, of F, I and W, got {times!r}"
        )
    exact = [Fraction(time) for time in times]
    scale = math.lcm(*(time.denominator for time in exact))
    f, i, w = (int(time * scale) for time in exact)
    return f, i, w


def _blocks(p: int, f: int, i: int, w: int) -> Iterator[Block]:
    """Blocks for these times, whatever memory they need."""
    longer = max(w, abs(f - i))
    yield from _turned(p, (A, B), (0, 2 * max(f, i)), (f, i, longer))
    longer = max(w, 2 * max(f, i) - min(f, i))
    yield from _turned(p, (A, B, C), (0, 2 * f, longer + i - f), (f, i, longer))


def _turned(
    p: int,
    rounds: Sequence[tuple[int, ...]],
    shifts: Sequence[int],
    times: tuple[int, int, int],
) -> Iterator[Block]:
    """One block for each round that the first device may follow."""
    for first in range(len(rounds)):
        turns = [(first + d) % len(rounds) for d in range(p)]
        clock = 0
        places = []
        for turn in turns:
            places.append(_places(rounds[turn], clock, times))
            clock += shifts[turn]
        yield _laid(places, times)


def _places(
    parts: Sequence[int], clock: int, times: tuple[int, int, int]
) -> dict[int, int]:
    """When a round that starts at the clock comes to each of F and I."""
    f, i, w = times
    lengths = (f, f, i, i, w)
    result = {}
    for part in parts:
        result[part] = clock
        clock += lengths[part]
    return result


def _laid(places: Sequence[dict[int, int]], times: tuple[int, int, int]) -> Block:
    """A micro-batch through these rounds, each op in the first that it reaches."""
    f, i, w = times
    interval = 2 * (f + i + w)
    p = len(places)
    starts = [[0] * 4 for _ in range(p)]
    now = 0
    for part, length in ((F0, f), (F1, f), (I1, i), (I0, i)):
        for d in range(p) if part in DOWN else range(p - 1, -1, -1):
            now += (places[d][part] - now) % interval
            starts[d][part] = now
            now += length
    return Block(tuple((*row,) for row in starts), interval, times)


def _published(case: Case) -> bool:
    """Whether it is the published order; one built for times has no formula."""
    return case.options.get("times") is None


def _grows(case: Case, each: Any) -> Bounds:
    """A round for each device at most, and what each micro-batch adds."""
    if not _published(case):
        return 0, (case.p - 1) * case.ideal
    return 0, case.p * (case.forward + case.backward) + case.m * max(0, each)


def _v_half_bounds(case: Case) -> Bounds:
    f, i, w = case.times
    return _grows(case, abs(f - i) - ratio(w, 2))


def _v_min_bounds(case: Case) -> Bounds:
    f, i, w = case.times
    return _grows(case, 2 * max(f, i) - min(f, i) - w)


V_HALF = Row(
    name="v-half",
    generator=v_half,
    summary="half of 1F1B's activations; times for F and I far apart",
    source="Qi et al. 2024, 2405.15362",
    constraints="none",
    bubble="(3p-7)/(6m+3p-7); p odd: 4 for 7",
    peak="floor(p/2)+1",
    idle=lambda case: ratio((3 * case.p - (4 if case.p % 2 else 7)) * case.forward, 2),
    peak_of=lambda case, d: case.p // 2 + 1,
    holds=lambda case: (
        case.p >= 3 and case.m >= 2 * case.p and case.equal_times and _published(case)
    ),
    bounds=_v_half_bounds,
)

V_MIN = Row(
    name="v-min",
    generator=v_min,
    summary="a third of 1F1B's activations; W no shorter than F and I",
    source="Qi et al. 2024, 2405.15362",
    constraints="none",
    bubble="(4p-5)/(6m+4p-5); 3 divides p: 7 for 5",
    peak="floor((p+4)/3); d=0, p mod 3 = 2: 1/2 less",
    idle=lambda case: ratio((4 * case.p - (5 if case.p % 3 else 7)) * case.forward, 2),
    peak_of=lambda case, d: ratio(
        2 * ((case.p + 4) // 3) - (d == 0 and case.p % 3 == 2), 2
    ),
    holds=lambda case: (
        case.p >= 2 and case.m >= 2 * case.p and case.equal_times and _published(case)
    ),
    bounds=_v_min_bounds,
)
