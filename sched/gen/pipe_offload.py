"""PipeOffload: grouped interleaving, with activations that wait on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import ParameterError, at_least_one
from pipeproof.sched.exact import Number, ratio
from pipeproof.sched.gen.interleaved import chunks_of, group_of
from pipeproof.sched.ir import F, I, Kind, Ops, Placement, Schedule, W, op
from pipeproof.sched.row import Bounds, Case, Row

Index = NDArray[np.int64]


def pipeoffload(
    devices: int,
    micro_batches: int,
    *,
    chunks: int = 2,
    group: int | None = None,
    offload: int | None = None,
) -> Schedule:
    """Interleaving that keeps on the device only what is soon needed.

    Micro-batches pass in groups of n, as in `interleaved`; device d runs
    (v-1)n+p-1-d forwards ahead. W follows its I, but the gradient leaves before W.
    The first k chunks, whose activations live longest, go to the host behind their
    forward, but for what would return before another op has run.

    With p=2, m=2, chunks=2, every op one tick::

        device 0 | 0F0 0F1 2F0 2F1 ... 2I0 ... 2I1 0I0 0I1
        device 1 | ... 1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 ...

    There k=1, and W and copies take no time; the row of device 0 is::

        0F0 0OFFLOAD0 0F1 0OFFLOAD1 2F0 2F1 2I0 2W0 0RELOAD0 2I1 2W1
        0RELOAD1 0I0 0W0 0I1 0W1

    A RELOAD stands ahead of the backward before the one that needs it, and has that
    backward, and the forward between them, to arrive. Copies delay nothing as long
    as each takes at most a forward and at most a backward. Behind that backward, it
    would have the forward only, and in the end no time; a backward earlier would
    keep one more chunk on the device where all are away.

    Placement: stage k on device k mod p.
    Bubble: 2(p-1)/(3vm+2(p-1)) of step time with F=I=W, for n=p that divides m: idle
        time (p-1)(F+I)/v. Groups of n < p, or m < n in one group (then n=m), idle
        (v-1)((p-n)F + max(0, pI-n(I+W)))/v more; several groups of n < p, if
        n(F+I+W) >= p max(F, I) and (p-1-n)W <= (n-1)F+nI. Equal stages, free links.
    Peak memory: max((v-k-1)n+p-d, 2) chunks of a micro-batch's activations on
        device d, for n=p <= m and 0 < k < v; (v-1)n+p-d for k=0; 2 for k=v > 1. With
        free copies; with the longest that delay nothing, at most one chunk more.

    Args:
        devices: p.
        micro_batches: m, per step. A last group of fewer than n keeps the order of a
            whole one, takes no longer and holds no more.
        chunks: v, stages on each device.
        group: n, from p/2, rounded up, to p; default p.
        offload: k, chunks whose activations go to the host, counted from the first:
            from 0 (none) to v (all); default v/2, rounded down.

    Raises:
        ParameterError: a size below 1, or a group or an offload out of its range.

    Source:
        Wan et al. 2025, arXiv:2503.01328: n=p is their GIS, n=p/2 their GIS-H. They
        time copies by how long they take; where a RELOAD stands is ours.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, chunks=chunks)
    p, m, v = devices, micro_batches, chunks
    n = min(_group(p, group), m)
    total = -(-m // n) * n * v  # as if the last group were whole
    place = np.arange(total)
    chunk, batch = _passes(place, v, n)
    there = batch < m
    place, chunk, batch = place[there], chunk[there], batch[there]
    last_first = v - 1 - chunk
    made = batch // n * n * v + last_first * n + batch % n  # turn of its forward
    to_host = last_first < _offload(v, offload)
    rows = []
    for d in range(p):
        turn = place + min((v - 1) * n + p - 1 - d, total)  # of the backwards
        back = np.append(turn[0] - 1, turn[:-1])  # of the RELOADs
        away = to_host & (made < back)
        stage = d + p * last_first
        out = stage[away], batch[away]
        rows.append(
            _by_turn(
                (F(d + p * chunk, batch), place),
                (op(Kind.OFFLOAD, *out), made[away]),
                (op(Kind.RELOAD, *out), back[away]),
                (I(stage, batch), turn),
                (W(stage, batch), turn),
            )
        )
    return Schedule.of(rows, name="pipeoffload", placement=Placement.looped(p, v))


def _passes(place: Index, v: int, n: int) -> tuple[Index, Index]:
    """Chunk and micro-batch of each forward, in whole groups."""
    groups, within = np.divmod(place, n * v)
    chunk, offset = np.divmod(within, n)
    return chunk, groups * n + offset


def _by_turn(*parts: tuple[Ops, Index]) -> Ops:
    """Turn by turn; within a turn, in the order of the parts."""
    keys = [turn * len(parts) + rank for rank, (_, turn) in enumerate(parts)]
    return Ops.of(ops for ops, _ in parts).take(np.argsort(np.concatenate(keys)))


def _group(p: int, group: int | None) -> int:
    if group is None:
        return p
    at_least_one(group=group)
    least = -(-p // 2)
    if not least <= group <= p:
        raise ParameterError(
            f"pipeoffload: with {p} devices, group must lie in {least} … {p}, got "
            f"{group}"
        )
    return group


def _offload(v: int, offload: int | None) -> int:
    if offload is None:
        return v // 2
    if type(offload) is not int or not 0 <= offload <= v:
        raise ParameterError(
            f"pipeoffload: with {v} chunks on a device, offload must be an integer in "
            f"0 … {v}, got {offload!r}"
        )
    return offload


def _group_of(case: Case) -> int:
    """N, of one group of all if they are fewer."""
    return min(group_of(case), case.m)


def _pipeoffload_idle(case: Case) -> Number:
    p, n, v = case.p, _group_of(case), chunks_of(case)
    f, i = case.forward, case.input_grad
    turn = (p - n) * f + max(0, p * i - n * case.backward)
    return ratio((p - 1) * (f + i) + (v - 1) * turn, v)


def _pipeoffload_peak(case: Case, d: int) -> Number:
    p, m, n, v = case.p, case.m, _group_of(case), chunks_of(case)
    given = case.options.get("offload")
    k = v // 2 if given is None else given
    if k == 0:
        return ratio(min((v - 1) * n + p - d, m * v), v)
    if k == v:  # what the last chunk keeps goes only where it stays away a while
        return ratio(2 if v > 1 else min(2, p - d, m), v)
    # On the way: one chunk whose forward runs, one that is back.
    kept = (v - k - 1) * n + min(p - d, n + 2 * (m > n))
    return ratio(max(kept, 2), v)


def _pipeoffload_steady(case: Case) -> bool:
    """Whether a group lasts until its first micro-batch has been round."""
    p, n = case.p, _group_of(case)
    f, i, w = case.times
    round_trip = n * (f + i + w) >= p * max(f, i)
    first_turn = (p - 1 - n) * w <= (n - 1) * f + n * i
    return n == case.m or bool(round_trip and first_turn)


def _pipeoffload_bounds(case: Case) -> Bounds:
    """No idler than with a whole last group, whose order it keeps."""
    low = ratio((case.p - 1) * (case.forward + case.input_grad), chunks_of(case))
    if not _pipeoffload_steady(case):
        return low, (case.p - 1) * case.ideal
    missing = -case.m % _group_of(case)
    return low, _pipeoffload_idle(case) + missing * (case.forward + case.backward)


PIPEOFFLOAD = Row(
    name="pipeoffload",
    generator=pipeoffload,
    summary="activations on the host: a few chunks stay on each device",
    source="Wan et al. 2025, 2503.01328",
    constraints="groups of n from half of p, rounded up, to p",
    bubble="2(p-1)/(3vm+2(p-1)), n=p",
    peak="max((v-k-1)n+p-d, 2)/v, k chunks away",
    idle=_pipeoffload_idle,
    peak_of=_pipeoffload_peak,
    holds=lambda case: case.m % _group_of(case) == 0 and _pipeoffload_steady(case),
    bounds=_pipeoffload_bounds,
    allows=lambda case: case.p <= 2 * group_of(case) <= 2 * case.p,
)
