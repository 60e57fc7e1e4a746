"""How many bytes a second cross each link between ranks.

    sender     ▶▶▶▶▶▶▶▶▶            all of them at once, the receives posted before
    receiver       ├ ├ ├ ├ ├ ├ ├ ┤  from the first that is there to the last

One link after the other, each with nothing else under way. Only the receiver's clock is
read, and the latency of the first message is none of what counts.
"""

from __future__ import annotations

from time import perf_counter

import torch

from pipeproof.exec.grid import Grid
from pipeproof.sched import Program
from pipeproof.sched.instructions import StreamKind

SIZE, COUNT = 1 << 20, 17
"""Bytes of a message, and how many: large enough for the link's rate to tell."""
Rates = dict[tuple[int, int], float]
"""By source and target device, bytes per second."""


def link_rates(grid: Grid, program: Program, device: torch.device) -> Rates:
    """The rate of each link of a pipeline; all its ranks call it, and get the same.

    Args:
        grid: of the ranks.
        program: that says between which devices there are links.
        device: of this rank's tensors.
    """
    ours = []
    for stream in program.streams:
        if stream.kind == StreamKind.SEND and stream.link is not None:
            rate = _measured(grid, *stream.link, device)
            if rate is not None:
                ours.append([*stream.link, rate])
    said = grid.ranks.exchange(ours, "the rates of the other ranks' links")
    return {(s, t): rate for rank in grid.row for s, t, rate in said[rank]}


def _measured(
    grid: Grid, source: int, target: int, device: torch.device
) -> float | None:
    """On the target, the rate of one link; None elsewhere."""
    ranks, me = grid.ranks, grid.device
    rows: list[torch.Tensor] = []
    if me in (source, target):
        rows = [
            torch.zeros(SIZE, dtype=torch.uint8, device=device) for _ in range(COUNT)
        ]
    receives, sends = [], []
    if me == target:
        into = ranks.incoming(grid.row[source], device)
        receives = [into.receive(row) for row in rows]
    ranks.exchange(None, "the receives of a link that is measured")
    if me == source:
        out = ranks.outgoing(grid.row[target], device)
        sends = [out.send(row, followed=False) for row in rows]
    for pending in sends:
        ranks.wait(pending, "a link that is measured")
    ends = []
    for pending in receives:
        ranks.wait(pending, "a link that is measured")
        if device.type == "cuda":  # NCCL's waits order this stream alone
            torch.cuda.current_stream(device).synchronize()
        ends.append(perf_counter())
    return (COUNT - 1) * SIZE / (ends[-1] - ends[0]) if ends else None
