"""Training with Adam that goes on from a checkpoint, on another number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import WIDTH, digest
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.nn import functional

from pipeproof.exec import Pipeline, split_at
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import catalog, with_steps

FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class Resumed:
    """Some steps, from a checkpoint or from the start.

    Attributes:
        path: of the checkpoint.
        meeting: a file where the ranks meet.
        sizes: layers in each stage.
        first, last: steps to make.
        name: of the schedule.
        stepped: whether its STEPs step the optimizers, one for each stage.
        tied: whether the last layer has the first one's weight.
    """

    path: Path
    meeting: Path
    sizes: tuple[int, ...]
    first: int
    last: int
    name: str = "1f1b"
    stepped: bool = False
    tied: bool = False


def resumed(ranks: Ranks | None, job: Resumed) -> dict[str, str]:
    """The part of the model here afterwards; from the start, it is written."""
    if ranks is None:
        return _train(False, len(job.sizes), job)
    meeting = dist.FileStore(str(job.meeting), ranks.size)
    dist.init_process_group(
        "gloo", store=meeting, rank=ranks.rank, world_size=ranks.size
    )
    try:
        return _train(ranks, ranks.size, job)
    finally:
        dist.destroy_process_group()


def _train(ranks: Ranks | bool, size: int, job: Resumed) -> dict[str, str]:
    torch.manual_seed(job.first)  # weights that are read come from the checkpoint
    layers = [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh()]
    model = nn.Sequential(*layers, *(nn.Linear(WIDTH, WIDTH) for _ in range(5)))
    if job.tied:
        model[-1].weight = model[0].weight
    plan = catalog.make(job.name, devices=size, micro_batches=4)
    schedule = with_steps(plan) if job.stepped else plan
    stages = split_at(model, job.sizes)
    mine = [
        n
        for n in range(len(stages))
        if not isinstance(ranks, Ranks) or ranks.rank in holders(schedule, n)
    ]
    groups: list[Any] = [list(stages[n].parameters()) for n in mine]
    if not job.stepped:
        groups = [list({id(p): p for group in groups for p in group}.values())]
    optimizers = [torch.optim.Adam(group, lr=0.01) for group in groups]
    given: list[Any] | None = None
    if job.stepped:
        of = dict(zip(mine, optimizers))
        given = [of.get(n) for n in range(len(stages))]
    pipeline = Pipeline(
        stages, schedule, functional.mse_loss, ranks=ranks, optimizers=given
    )

    def state() -> dict[str, Any]:
        return {
            "model": pipeline.state_dict(model),
            "optimizer": states.get_optimizer_state_dict(
                model, tuple(optimizers), options=FLAT
            ),
        }

    if job.first:
        found = state()
        dcp.load(found, checkpoint_id=job.path, no_dist=ranks is False)
        states.set_optimizer_state_dict(
            model, tuple(optimizers), found["optimizer"], options=FLAT
        )
    for step in range(job.first, job.last):
        torch.manual_seed(100 + step)
        pipeline.step(*torch.randn(2, 9, WIDTH))
        for optimizer in () if job.stepped else optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if not job.first:
        dcp.save(state(), checkpoint_id=job.path, no_dist=ranks is False)
    here = pipeline.state_dict(model)
    return {key: digest(value) for key, value in here.items()}
