"""Jobs that save a model's state, and read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import WIDTH, digest
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline, split_at
from pipeproof.exec.group import Ranks
from pipeproof.sched import catalog


@dataclass(frozen=True)
class Saved:
    """A model of four layers whose state two ranks save."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def saved(ranks: Ranks, job: Saved) -> dict[str, Tensor]:
    """This rank's part of the model's state."""
    model = job.model()
    schedule = catalog.make("1f1b", devices=2, micro_batches=3)
    stages = split_at(model, (1, 3))
    pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
    return pipeline.state_dict(model)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that ranks write together, or read.

    Attributes:
        path: of it.
        meeting: a file where these ranks meet.
        sizes: layers in each stage.
        seed: of the model's first weights.
        reads: whether it is read, and not trained and written.
    """

    path: Path
    meeting: Path
    sizes: tuple[int, ...]
    seed: int = 0
    reads: bool = False

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        return nn.Sequential(nn.BatchNorm1d(WIDTH), *layers, nn.BatchNorm1d(WIDTH))


def checkpointed(ranks: Ranks, job: Checkpoint) -> dict[str, str]:
    """Of this rank's part of the model, the values: as written, or as read."""
    meeting = dist.FileStore(str(job.meeting), ranks.size)
    dist.init_process_group(
        "gloo", store=meeting, rank=ranks.rank, world_size=ranks.size
    )
    try:
        model = job.model()
        schedule = catalog.make("1f1b", devices=ranks.size, micro_batches=4)
        stages = split_at(model, job.sizes)
        pipeline = Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)
        state = pipeline.state_dict(model)
        if job.reads:
            dcp.load(state, checkpoint_id=job.path)  # into the model's own tensors
        else:
            own = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(own, lr=0.1)
            pipeline.step(*torch.randn(2, 9, WIDTH))
            optimizer.step()
            dcp.save(state, checkpoint_id=job.path)
        here = pipeline.state_dict(model)
        return {key: digest(value) for key, value in here.items()}
    finally:
        dist.destroy_process_group()
