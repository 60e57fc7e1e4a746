"""What pipelines side by side are asked to do, and what must come of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jobs import WIDTH, attentive, same_values
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh

from pipeproof.exec import Pipeline, reference
from pipeproof.exec.bind import holders
from pipeproof.exec.group import Ranks
from pipeproof.sched import Schedule, catalog, recompute

POSITIONS = 3

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Grid:
    """A schedule for each of some replicas, and the rows of their batches.

    Attributes:
        name, devices, micro_batches, policy: of the schedule.
        rows: of each replica.
        stage: makes one from its number.
        scale: as for `Pipeline`.
        steps: without zeroing gradients.
        mesh: given as a mesh of torch, instead of a number of replicas.
    """

    name: str
    devices: int
    micro_batches: int
    rows: tuple[int, ...]
    policy: str = "never"
    stage: Callable[[int], nn.Module] = attentive
    scale: Any = "rows"
    steps: int = 2
    mesh: bool = False

    @property
    def schedule(self) -> Schedule:
        schedule = catalog.make(
            self.name, devices=self.devices, micro_batches=self.micro_batches
        )
        return recompute(schedule, self.policy)

    def stages(self) -> list[nn.Module]:
        torch.manual_seed(3)
        return [self.stage(n).double() for n in range(self.schedule.stages)]

    def batch(self, replica: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(10 + replica)
        shape = 2, self.rows[replica], POSITIONS, WIDTH
        return tuple(torch.randn(shape, dtype=torch.float64))

    def weight(self, targets: Tensor) -> float:
        """Of a micro-batch or a slice."""
        if callable(self.scale):
            return float(self.scale(targets))
        return float(len(targets) * (targets.shape[1] if self.sliced else 1))

    @property
    def sliced(self) -> bool:
        return self.schedule.slices > 1

    def total(self) -> float:
        """Weight of all replicas' batches."""
        return sum(
            self.weight(part)
            for replica in range(len(self.rows))
            for whole in self.batch(replica)[1].tensor_split(self.micro_batches)
            for part in whole.tensor_split(self.schedule.slices, 1)
        )


def weigh(targets: Tensor) -> Tensor:
    """Micro-batches with a negative first target do not count."""
    return (targets.flatten()[0] > 0) * targets.shape[0]


@dataclass(frozen=True)
class Result:
    """Losses of the steps, and gradients by stage."""

    losses: list[float]
    grads: dict[int, Gradients]


def joined(ranks: Ranks, grid: Grid) -> dict[str, Any]:
    """How a pipeline is told."""
    if not grid.mesh:
        return {"ranks": ranks, "data_parallel": len(grid.rows)}
    store = PrefixStore("mesh", ranks.store)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    shape = len(grid.rows), grid.devices
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp"))
    return {"ranks": mesh["pp"], "data_parallel": mesh["dp"]}


def of_grid(ranks: Ranks, grid: Grid) -> Result:
    """As one of the ranks, replica by replica."""
    replica, device = divmod(ranks.rank, grid.devices)
    stages, schedule, scale = grid.stages(), grid.schedule, grid.scale
    pipeline = Pipeline(
        stages, schedule, same_values, loss_scale=scale, **joined(ranks, grid)
    )
    batch = grid.batch(replica)
    torch.manual_seed(5)
    losses = [pipeline.step(*batch).item() for _ in range(grid.steps)]
    if grid.mesh:
        Ranks.among(range(ranks.size)).leave()
        dist.destroy_process_group()
    mine = [n for n in range(len(stages)) if device in holders(schedule, n)]
    return Result(losses, {n: [p.grad for p in stages[n].parameters()] for n in mine})


def of_references(grid: Grid) -> Result:
    """Each replica's reference on its own rows, and the sum in their order."""
    stages, total = grid.stages(), grid.total()

    def share(output: Tensor, targets: Tensor) -> Tensor:
        loss = same_values(output, targets)
        if grid.scale == "sum":
            return loss
        factor = grid.weight(targets) / total
        return loss * factor if factor else loss.detach() * 0 + 0 * output.sum()

    losses = []
    parameters = [p for stage in stages for p in stage.parameters()]
    torch.manual_seed(5)
    following = torch.get_rng_state()
    for _ in range(grid.steps):
        seed = following
        found, loss = [], 0.0
        for replica in range(len(grid.rows)):
            twin = copy.deepcopy(stages)
            ours = [p for stage in twin for p in stage.parameters()]
            for p in ours:
                p.grad = None
            batch = grid.batch(replica)
            torch.set_rng_state(seed)
            loss += reference(
                twin, grid.schedule, share, *batch, loss_scale="sum", replica=replica
            ).item()
            following = torch.get_rng_state()
            found.append([p.grad for p in ours])
        losses.append(loss)
        for p, grads in zip(parameters, zip(*found)):
            total_grad = None
            for grad in grads:
                if grad is not None:
                    total_grad = grad if total_grad is None else total_grad + grad
            if total_grad is not None:
                p.grad = total_grad if p.grad is None else p.grad + total_grad
    return Result(
        losses, {n: [p.grad for p in s.parameters()] for n, s in enumerate(stages)}
    )
