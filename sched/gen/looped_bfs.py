"""Breadth first: each chunk takes all micro-batches before the next one starts."""

from __future__ import annotations

from pipeproof.sched.errors import at_least_one
from pipeproof.sched.exact import ratio
from pipeproof.sched.gen.interleaved import chunks_of
from pipeproof.sched.ir import B, F, Placement, Schedule
from pipeproof.sched.row import Row


def looped_bfs(devices: int, micro_batches: int, *, chunks: int = 2) -> Schedule:
    """Interleaving with one pass of each chunk: few gathers of sharded weights.

    With p=2, m=2, chunks=2, every op one tick::

        device 0 | 0F0 0F1 2F0 2F1 ... ... 2B0 2B1 0B0 0B1
        device 1 | ... 1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1 ...

    Placement: stage k on device k mod p.
    Bubble: (p-1)/(vm+p-1) of step time, for m >= p; below, each of the v-1 turns
        from chunk to chunk idles (p-m)(F+B)/v more. Equal stages, free links.
    Peak memory: m micro-batch activations on every device.

    Args:
        devices: p.
        micro_batches: m, per step.
        chunks: v, stages on each device.

    Raises:
        ParameterError: a size below 1.

    Source:
        Lamy-Poirier 2022, arXiv:2211.05953. Backwards run first in, first out
        here, in torch's LoopedBFS last in, first out: neither bubble nor peak
        depends on it.
    """
    at_least_one(devices=devices, micro_batches=micro_batches, chunks=chunks)
    p, m, v = devices, micro_batches, chunks
    every = range(m)
    down = range(0, p * v, p)
    rows = [
        [F(d + s, every) for s in down] + [B(d + s, every) for s in down[::-1]]
        for d in range(p)
    ]
    return Schedule.of(rows, name="looped-bfs", placement=Placement.looped(p, v))


LOOPED_BFS = Row(
    name="looped-bfs",
    generator=looped_bfs,
    summary="interleaved with sharded weights: a gather for each chunk pass",
    source="Lamy-Poirier 2022, 2211.05953",
    constraints="none",
    bubble="(p-1)/(vm+p-1), m >= p",
    peak="m",
    idle=lambda case: ratio(
        ((chunks_of(case) - 1) * max(case.p - case.m, 0) + case.p - 1)
        * (case.forward + case.backward),
        chunks_of(case),
    ),
    peak_of=lambda case, d: case.m,
)
