"""BPipe: 1F1B whose first devices keep activations in the memory of the last."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.gen.one_f_one_b import one_f_one_b
from pipeproof.sched.ir import Kind, Ops, Schedule, op
from pipeproof.sched.row import Case, Row


def bpipe(devices: int, micro_batches: int) -> Schedule:
    """1F1B with memory balanced between the first devices and the last.

    Under 1F1B device d holds p-d micro-batches and device p-1-d only d+1. Here a
    device that would hold more than n = ceil((p+2)/2) evicts some to that partner,
    and loads each back before its backward.

    With p=4, m=4, every op one tick::

        device 0 | F0 F1 F2 F3 .. .. .. B0 .. B1 .. B2 .. B3
        device 1 | .. F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3 ..
        device 2 | .. .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 .. ..
        device 3 | .. .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. .. ..

    where the copies of device 0 run beside its ops::

        F0 F1 OFFLOAD1 F2 OFFLOAD2 F3 RELOAD1 B0 RELOAD2 B1 B2 B3

    A copy has the time of one op: it runs beside the op behind it, and nothing
    waits for it before the next one. n has room for that: it counts what comes in
    or goes out beside an op. Under 1F1B the two partners hold p+1; with one more
    under way, n on the first leaves p+2-n <= n on the other.

    Placement: stage d on device d.
    Bubble: (p-1)/(m+p-1) of step time; equal stages, free links.
    Peak memory: ceil((p+2)/2) micro-batch activations on a device that evicts,
        one with min(p-d, m) above that; floor((p+2)/2) on its partner, for m
        above p, and at most that below; min(p-d, m) on the others.

    Args:
        devices: p, one stage on each.
        micro_batches: m, per step.

    Raises:
        ParameterError: either is below 1.

    Source:
        Kim et al. 2023, BPipe, ICML 2023 (PMLR 202). Which micro-batches to
        evict is chosen here: no choice has fewer copies in the steady state.
    """
    at_least_one(devices=devices, micro_batches=micro_batches)
    p, m = devices, micro_batches
    plain = one_f_one_b(p, m)
    rows = [plain.row(d) for d in range(p)]
    offload_to: list[int | None] = [None] * p
    for d in range(p):
        held, most = min(p - d, m), (p + 3) // 2
        if held > most:
            offload_to[d] = p - 1 - d
            rows[d] = _with_copies(rows[d], _evicted(m, held, most))
    return Schedule.of([[row] for row in rows], name="bpipe", offload_to=offload_to)


def _evicted(micro_batches: int, held: int, most: int) -> NDArray[np.int64]:
    """Which of m micro-batches leave a device that holds `held` of them in turn.

    While a device makes or uses up a micro-batch, and another comes or goes, at
    most `most` - 2 of the `held` - 2 between these two may be there. So out of as
    many in a row, that many stay, spread evenly. The first and the last stay too:
    there is no op beside which the first could go and come back, or the last.
    """
    between, stay = held - 2, most - 2
    staying = np.arange(-(-stay * micro_batches // between)) * between // stay
    staying[-1] = micro_batches - 1  # where it was, or one further
    return np.setdiff1d(np.arange(micro_batches), staying)


def _with_copies(row: Ops, evicted: NDArray[np.int64]) -> Ops:
    """Offload behind the forward; reload two ops ahead of the backward."""
    stage = int(row.stage[0])
    forward = np.flatnonzero(row.kind == Kind.F)[evicted]
    backward = np.flatnonzero(row.kind == Kind.B)[evicted]
    copies = [op(kind, stage, evicted) for kind in (Kind.OFFLOAD, Kind.RELOAD)]
    ahead_of = np.concatenate([np.arange(len(row)) + 0.5, forward + 1, backward - 1])
    return Ops.of([row, *copies]).take(np.argsort(ahead_of, kind="stable"))


def _bpipe_peak(case: Case, d: int) -> int:
    """A device's own, up to the most; its partner's own and what it takes over."""
    most = (case.p + 3) // 2
    own, others = min(case.p - d, case.m), min(d + 1, case.m)
    if own > most or others <= most:
        return min(own, most)
    # Of any others - 2 micro-batches in turn, others - most are away. One more is
    # while the one that leaves next has left and the one back next is not back: two
    # that are others - 2 apart, the first of them e or later.
    e = -(-(most - 2) // (others - most))
    return own + others - most + (case.m >= others - 1 + e)


BPIPE = Row(
    name="bpipe",
    generator=bpipe,
    summary="1F1B's bubble; the first devices' activations kept by the last",
    source="Kim et al. 2023, BPipe, ICML 2023",
    constraints="none",
    bubble="(p-1)/(m+p-1)",
    peak="at most ceil((p+2)/2)",
    idle=lambda case: case.fill_drain,
    peak_of=_bpipe_peak,
)
