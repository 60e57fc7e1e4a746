"""Steps without targets, on ranks and as plain loops."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jobs import WIDTH, digest
from torch import Tensor, nn

from pipeproof.exec import Pipeline, reference
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import Schedule, catalog

POSITIONS = 5


def square(output: Tensor) -> Tensor:
    return output.square().mean()


@dataclass(frozen=True)
class Targetless:
    """A schedule, and the rows of each replica's batch."""

    name: str
    devices: int
    rows: tuple[int, ...]
    scale: str = "rows"

    @property
    def schedule(self) -> Schedule:
        return catalog.make(self.name, devices=self.devices, micro_batches=4)

    def stages(self) -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(WIDTH, WIDTH).double() for _ in range(self.schedule.stages)]

    def batch(self, replica: int) -> Tensor:
        torch.manual_seed(replica)
        return torch.randn(self.rows[replica], POSITIONS, WIDTH, dtype=torch.float64)


Found = tuple[float, dict[int, str]]
"""The loss, and of each stage the gradients."""


def trained_on_ranks(ranks: Ranks, job: Targetless) -> Found:
    """As one of the ranks; only those of a first stage have something to give."""
    stages, schedule = job.stages(), job.schedule
    replica, device = divmod(ranks.rank, job.devices)
    pipeline = Pipeline(
        stages,
        schedule,
        square,
        ranks=ranks,
        data_parallel=len(job.rows),
        loss_scale=job.scale,  # type: ignore[arg-type]
    )
    given = job.batch(replica) if device in holders(schedule, 0) else None
    loss = pipeline.step(given)
    before = {
        n: digest(*(p.grad for p in stage.parameters()))
        for n, stage in enumerate(stages)
        if device in holders(schedule, n)
    }
    torch.testing.assert_close(pipeline.evaluate(given), loss)
    return loss.item(), before


def trained_alone(job: Targetless) -> Found:
    """Of references, weighed by their rows and added up."""
    stages = job.stages()
    replicas = len(job.rows)
    losses, grads = [], []
    for replica in range(replicas):
        twins = copy.deepcopy(stages)
        x = job.batch(replica)
        if replicas == 1:
            loss = reference(
                twins,
                job.schedule,
                square,
                x,
                loss_scale=job.scale,  # type: ignore[arg-type]
            )
            losses.append(loss.item())
        else:  # the same factors as with all rows in one batch
            parts = [len(part) for part in x.tensor_split(4)]
            factors = iter(parts)
            total = sum(job.rows)

            def weighed(output: Tensor) -> Tensor:
                return square(output) * (next(factors) / total)  # noqa: B023

            loss = reference(twins, job.schedule, weighed, x, loss_scale="sum")
            losses.append(loss.item())
        grads.append([p.grad for twin in twins for p in twin.parameters()])
    parameters = [p for stage in stages for p in stage.parameters()]
    for p, first, *others in zip(parameters, *grads):
        p.grad = sum(others, start=first)
    found = {n: digest(*(p.grad for p in s.parameters())) for n, s in enumerate(stages)}
    return sum(losses), found
