"""A job that trains stages which share a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jobs import WIDTH
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import catalog


@dataclass(frozen=True)
class Tied:
    """Steps of a model of which two stages share their weight.

    Attributes:
        name, devices: of the schedule.
        told: ranks that are given all stages; the others only have their own.
        pair: the two.
        sparse: whether the first of these looks its weight up, as a table.
    """

    name: str = "1f1b"
    devices: int = 4
    told: tuple[int, ...] = (0, 1, 2, 3)
    pair: tuple[int, int] = (0, -1)
    sparse: bool = False


class Table(nn.Module):
    """One whose gradient is sparse."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.embedding(x.argmax(1), self.weight, sparse=True)


@dataclass(frozen=True)
class Trained:
    """What tied training leaves.

    Attributes:
        norms: of each step, before clipping.
        weights: of each stage here.
    """

    norms: list[float]
    weights: dict[int, Tensor]


def tied(ranks: Ranks | bool, job: Tied) -> Trained:
    """Three steps with clipping, an optimizer, and gradients over two steps once."""
    schedule = catalog.make(job.name, devices=job.devices, micro_batches=8)
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()
        for _ in range(schedule.stages)
    ]
    one, other = job.pair
    stages[other][0].weight = stages[one][0].weight
    if job.sparse:
        stages[one][0] = Table(stages[one][0].weight)
    mine = list(range(schedule.stages))
    given: list[Any] = list(stages)
    if isinstance(ranks, Ranks):
        mine = [n for n in mine if ranks.rank in holders(schedule, n)]
        if ranks.rank not in job.told:
            given = [stage if n in mine else None for n, stage in enumerate(stages)]
    pipeline = Pipeline(given, schedule, functional.mse_loss, ranks=ranks)
    parameters = {id(p): p for n in mine for p in stages[n].parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.1)
    norms = []
    for twice in (False, True, False):
        for _ in range(1 + twice):
            torch.manual_seed(len(norms))
            pipeline.step(*torch.randn(2, 9, WIDTH, dtype=torch.float64))
        norms.append(pipeline.clip_grad_norm_(1e-2))
        optimizer.step()
        optimizer.zero_grad()
    return Trained(norms, {n: stages[n][0].weight.detach() for n in mine})
