"""A job with scaled losses, in which gradients may overflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jobs import WIDTH
from torch import nn
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.exec.group import Ranks
from pipeproof.sched import catalog


@dataclass(frozen=True)
class Scaled:
    """A step with scaled losses, in which a stage's gradient may overflow."""

    broken: int | None


@dataclass(frozen=True)
class Moved:
    """Of each stage here, whether its optimizer stepped, and its scale afterwards."""

    moved: list[bool]
    scales: list[float]


def scaled(ranks: Ranks | bool, job: Scaled) -> Moved:
    """Each stage has its own optimizer, each process a scaler."""
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    torch.manual_seed(0)
    stages = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    if job.broken is not None:
        stages[job.broken].weight.register_hook(lambda grad: grad * torch.inf)
    mine = [ranks.rank] if isinstance(ranks, Ranks) else [0, 1]
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pipeline.step(*torch.randn(2, 6, WIDTH), scaler=scaler)
    before = [stages[n].weight.detach().clone() for n in mine]
    for optimizer in [torch.optim.SGD(stages[n].parameters(), lr=0.1) for n in mine]:
        scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(stages[n].weight, w) for n, w in zip(mine, before)]
    return Moved(moved, [scaler.get_scale()] * len(mine))
