"""Interleaved 1F1B: several chunks of the model on each device, depth first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.ir import B, F, Placement, Schedule, alternate
from pipeproof.sched.row import Bounds, Case, Row


def interleaved(
    devices: int, micro_batches: int, *, chunks: int = 2, group: int | None = None
) -> Schedule:
    """A shorter bubble for v chunks on each device, and v times the messages.

    Micro-batches pass in groups of n: each chunk in turn takes a whole group,
    backwards from the last chunk to the first.

    With p=2, m=2, chunks=2, every op one tick::

        device 0 | 0F0 0F1 2F0 2F1 ... 2B0 ... 2B1 0B0 0B1
        device 1 | ... 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 ...

    Placement: stage k on device k mod p.
    Bubble: (p-1)/(vm+p-1) of step time, where n >= p, and the last group has p or
        more; one group of m < p idles (v-1)(p-m)(F+B)/v more. Equal stages, free
        links. No other case idles less than (p-1)(F+B)/v; a last group of r < p idles
        at most (v-1)(p-r)p(F+B)/2v more.
    Peak memory: min((v-1)n+2(p-1-d)+1, vm) chunks of a micro-batch's activations
        on device d, there.

    Args:
        devices: p.
        micro_batches: m, per step; no multiple of the group need be.
        chunks: v, stages on each device.
        group: n, micro-batches that pass a chunk in a row; default p.

    Raises:
        ParameterError: a size below 1, or groups with which the published order
            makes devices wait for each other: none do with one group of all, nor
            where n >= p and the last group has at least p-2.

    Source:
        Narayanan et al. 2021, arXiv:2104.04473, 2.2; their m is a multiple of p.
        Groups of any size: Llama team 2024, arXiv:2407.21783, 3.3.2. Which of
        them deadlock is ours, held against `check` for p up to 7.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, chunks=chunks)
    p, m, v = devices, micro_batches, chunks
    n = p if group is None else group
    at_least_one(group=n)
    if not gets_through(p, m, v, n):
        raise ParameterError(
            f"interleaved: with groups of {n}, the last of {_last(m, n)}, {p} devices "
            f"would wait for each other: give a group of at least {p} that leaves 0 or "
            f"at least {p - 2} of the {m} micro-batches over, or group={m}"
        )
    chunk, batch = _passes(m, v, n)
    rows = []
    for d in range(p):
        warmup = min((v - 1) * n + 2 * (p - 1 - d), m * v)
        steady = m * v - warmup
        forward = F(d + p * chunk, batch)
        backward = B(d + p * (v - 1 - chunk), batch)
        rows.append(
            [
                forward[:warmup],
                alternate(forward[warmup:], backward[:steady]),
                backward[steady:],
            ]
        )
    return Schedule.of(rows, name="interleaved", placement=Placement.looped(p, v))


def gets_through(p: int, m: int, v: int, n: int) -> bool:
    """Whether groups of n leave an order in which no devices wait for each other.

    A backward on the last device waits, by way of the first device, for a forward
    there, and that one for a forward of the chunk before on the last device, which
    must not stand behind the backward.
    """
    chunk, _ = _passes(m, v, n)
    place = np.arange(m * v)
    size = np.minimum(n, m - place // (n * v) * n)
    before = np.where(chunk > 0, place - size, -1)  # the same in the chunk before
    needed = np.maximum.accumulate(before)
    late = place[chunk > 0]  # backwards that come from the first device, likewise
    warmup = (v - 1) * n
    forward = np.minimum(before[late] + warmup + 2 * (p - 1), m * v - 1)
    return p == 1 or bool((needed[forward] <= late + warmup).all())


def _passes(m: int, v: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chunk and micro-batch of each forward, group by group."""
    place = np.arange(m * v)
    first = place // (n * v) * n
    chunk, offset = np.divmod(place - first * v, np.minimum(n, m - first))
    return chunk, first + offset


def _last(m: int, n: int) -> int:
    return m % n or min(m, n)


def chunks_of(case: Case) -> int:
    """V."""
    return int(case.options.get("chunks", 2))


def group_of(case: Case) -> int:
    """N."""
    return int(case.options.get("group") or case.p)


def _interleaved_idle(case: Case) -> Number:
    v, turns = chunks_of(case), 0
    if case.m <= group_of(case):
        turns = (v - 1) * max(case.p - case.m, 0)
    return ratio((case.p - 1 + turns) * (case.forward + case.backward), v)


def _interleaved_bounds(case: Case) -> Bounds:
    """A small last group delays the way round, more so where F and B differ."""
    v = chunks_of(case)
    low = ratio(case.fill_drain, v)
    if group_of(case) < case.p:
        return low, (case.p - 1) * case.ideal
    missing = case.p - _last(case.m, group_of(case))
    waits = (v - 1) * missing * case.p * (case.forward + case.backward)
    return low, low + ratio(waits, 2 * v)


INTERLEAVED = Row(
    name="interleaved",
    generator=interleaved,
    summary="v chunks a device: a shorter bubble for more messages",
    source="Narayanan et al. 2021, 2104.04473, 2.2; 2407.21783, 3.3.2",
    constraints="groups of n = p or more whose last has p-2 or more, or n >= m",
    bubble="(p-1)/(vm+p-1), last group >= p",
    peak="min((v-1)n+2(p-1-d)+1, vm)/v",
    idle=_interleaved_idle,
    peak_of=lambda case, d: ratio(
        min(
            (chunks_of(case) - 1) * group_of(case) + 2 * (case.p - 1 - d) + 1,
            case.m * chunks_of(case),
        ),
        chunks_of(case),
    ),
    holds=lambda case: (
        case.m <= group_of(case) or _last(case.m, group_of(case)) >= case.p
    ),
    bounds=_interleaved_bounds,
    allows=lambda case: gets_through(case.p, case.m, chunks_of(case), group_of(case)),
)
