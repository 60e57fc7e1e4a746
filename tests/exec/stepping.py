"""Training in which the schedule says when optimizers step, on ranks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from grids import Grid, joined, plain, whole
from jobs import WIDTH, attentive, digest, same_values
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.nn import functional
from torch.optim import SGD, Adam

from pipeproof.exec import Pipeline, reference
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import Schedule, catalog, reduce_gradients, with_steps

STEPS = 3


@dataclass(frozen=True)
class Stepping:
    """Some steps of a schedule with STEPs.

    Attributes:
        name, devices: of the schedule.
        replicas: pipelines side by side.
        sharded: by FSDP2 over the replicas.
        tied: the first and the last stage share a weight.
    """

    name: str
    devices: int
    replicas: int = 1
    sharded: bool = False
    tied: bool = False

    @property
    def grid(self) -> Grid:
        """Sums, so that no row weighs."""
        rows = (5, 8) if self.replicas > 1 else (9,)
        return Grid(
            self.name,
            self.devices,
            4,
            rows,
            stage=plain if self.sharded or self.tied else attentive,
            scale="sum",
            mesh=self.sharded,
            sharded=self.sharded,
            tied=self.tied,
        )

    @property
    def schedule(self) -> Schedule:
        """Each stage's gradient is summed, and then used."""
        schedule = self.grid.schedule
        if self.replicas > 1:
            schedule = reduce_gradients(schedule)
        return with_steps(schedule)

    def __str__(self) -> str:
        words = f"{self.name} on {self.devices} × {self.replicas}"
        return words + " sharded" * self.sharded + " tied" * self.tied


def stepped_on_ranks(ranks: Ranks, job: Stepping) -> dict[int, str]:
    """The weights of the stages here, after some steps."""
    grid, schedule = job.grid, job.schedule
    given = joined(ranks, grid)
    replica, device = divmod(ranks.rank, job.devices)
    stages = grid.stages()
    if job.tied:
        stages[-1].linear.weight = stages[0].linear.weight
    mine = [n for n in range(len(stages)) if device in holders(schedule, n)]
    if job.sharded:
        from torch.distributed.fsdp import fully_shard

        for number in mine:
            fully_shard(stages[number], mesh=given["data_parallel"])
    pipeline = Pipeline(
        stages,
        schedule,
        same_values,
        loss_scale="sum",
        optimizers=[
            Adam(stage.parameters(), lr=0.1, foreach=False) if n in mine else None
            for n, stage in enumerate(stages)
        ],
        **given,
    )
    for step in range(STEPS):
        x, y = grid.batch(replica)
        torch.manual_seed(step)
        pipeline.step(x + step, y)
        assert all(p.grad is None for n in mine for p in stages[n].parameters())
    weights = {n: _weights(stages[n]) for n in mine}
    if job.sharded:
        Ranks.among(range(ranks.size)).leave()
        dist.destroy_process_group()
    return weights


def of_references(job: Stepping) -> dict[int, str]:
    """The same in one process, of plain loops, whose gradients are added up.

    What is tied is two parameters here, each of which gets the sum of both gradients.
    """
    grid = job.grid
    stages = grid.stages()
    optimizer = Adam([p for s in stages for p in s.parameters()], 0.1, foreach=False)
    for step in range(STEPS):
        found: list[list[Tensor | None]] = []
        for replica in range(job.replicas):
            twins = copy.deepcopy(stages)
            x, y = grid.batch(replica)
            torch.manual_seed(step)
            reference(
                twins,
                job.schedule,
                same_values,
                x + step,
                y,
                loss_scale="sum",
                replica=replica,
            )
            found.append([p.grad for twin in twins for p in twin.parameters()])
        parameters = [p for stage in stages for p in stage.parameters()]
        for p, first, *others in zip(parameters, *found):
            p.grad = sum(others, start=first)
        if job.tied:
            weights = [stage.linear.weight for stage in (stages[0], stages[-1])]
            total = weights[0].grad + weights[1].grad
            for weight in weights:
                weight.grad = total
        optimizer.step()
        optimizer.zero_grad()
    return {n: _weights(stage) for n, stage in enumerate(stages)}


def _weights(stage: nn.Module) -> str:
    return digest(*(whole(p.detach()) for p in stage.parameters()))


class Broken(SGD):
    """Fails in its first step."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("no memory for moments")


def spoiled(ranks: Ranks, kind: str) -> str:
    """What a rank says of something that is wrong on rank 1, or on all."""
    here = ranks.rank == 1
    store = PrefixStore(f"spoiled {kind}", ranks.store)
    company = Ranks(store, ranks.rank, ranks.size, timeout_s=5)
    name = "chimera" if kind == "other" else "1f1b"
    schedule = with_steps(catalog.make(name, devices=ranks.size, micro_batches=4))
    torch.manual_seed(0)
    stages = [nn.Linear(WIDTH, WIDTH) for _ in range(schedule.stages)]
    if kind == "tied":
        stages[3].weight = stages[0].weight
    optimizers: Any = [SGD(stage.parameters(), lr=0.1) for stage in stages]
    if kind == "tied" and here:
        optimizers[0] = None  # not its own
    if kind == "tied" and ranks.rank == 3:
        optimizers[3] = SGD(stages[3].parameters(), lr=0.1, momentum=0.9)
    if kind == "raises" and here:
        optimizers[1] = Broken(stages[1].parameters())
    elif kind == "other" and ranks.rank == 0:
        optimizers[0] = SGD(stages[0].parameters(), lr=0.2)
    try:
        pipeline = Pipeline(
            stages,
            schedule,
            functional.mse_loss,
            ranks=company,
            optimizers=None if kind == "none" else optimizers,
        )
        for _ in range(2):  # the last rank is through with a step before the others
            x, y = torch.randn(2, 8, WIDTH)
            pipeline.step(x, y, accumulate=here and kind == "accumulates")
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()
