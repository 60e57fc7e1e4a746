"""What pipelines side by side are asked to do, and what must come of it."""

from __future__ import annotations

import copy
import math
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
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import Schedule, catalog, recompute

POSITIONS = 3


class Plain(nn.Module):
    """One unit, also when it is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def plain(number: int) -> nn.Module:
    return Plain()


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
        sharded: by FSDP2 over the replicas.
        tied: the first and the last stage share their weight.
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
    sharded: bool = False
    tied: bool = False

    @property
    def schedule(self) -> Schedule:
        schedule = catalog.make(
            self.name, devices=self.devices, micro_batches=self.micro_batches
        )
        return recompute(schedule, self.policy)

    def stages(self) -> list[nn.Module]:
        torch.manual_seed(3)
        stages = [self.stage(n).double() for n in range(self.schedule.stages)]
        if self.tied:
            stages[-1].load_state_dict(stages[0].state_dict())
        return stages

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
    """Losses of the steps, gradients by stage, and the norm of all of them."""

    losses: list[float]
    grads: dict[int, Gradients]
    norm: float


def joined(ranks: Ranks, grid: Grid) -> dict[str, Any]:
    """How a pipeline is told."""
    if not grid.mesh:
        return {"ranks": ranks, "data_parallel": len(grid.rows)}
    once = f"mesh of {grid.name} {grid.rows} {grid.sharded}"
    store = PrefixStore(once, ranks.store)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    shape = len(grid.rows), grid.devices
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "pp"))
    return {"ranks": mesh["pp"], "data_parallel": mesh["dp"]}


def of_grid(ranks: Ranks, grid: Grid) -> Result:
    """As one of the ranks, replica by replica."""
    replica, device = divmod(ranks.rank, grid.devices)
    stages, schedule, scale = grid.stages(), grid.schedule, grid.scale
    if grid.tied:
        stages[-1].linear.weight = stages[0].linear.weight
    given = joined(ranks, grid)
    mine = [n for n in range(len(stages)) if device in holders(schedule, n)]
    if grid.sharded:
        from torch.distributed.fsdp import fully_shard

        for number in mine:
            fully_shard(stages[number], mesh=given["data_parallel"])
    pipeline = Pipeline(stages, schedule, same_values, loss_scale=scale, **given)
    batch = grid.batch(replica)
    torch.manual_seed(5)
    losses = [pipeline.step(*batch).item() for _ in range(grid.steps)]
    grads = {n: [whole(p.grad) for p in stages[n].parameters()] for n in mine}
    norm = pipeline.clip_grad_norm_(math.inf)
    if grid.mesh:
        Ranks.among(range(ranks.size)).leave()
        dist.destroy_process_group()
    return Result(losses, grads, norm)


def whole(grad: Any) -> Tensor | None:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


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
        totals = {}
        for p, grads in zip(parameters, zip(*found)):
            total_grad = None
            for grad in grads:
                if grad is not None:
                    total_grad = grad if total_grad is None else total_grad + grad
            totals[p] = total_grad
        if grid.tied:  # each stage's over the replicas, and then those of the stages
            shared = [stage.linear.weight for stage in (stages[0], stages[-1])]
            once = totals[shared[0]] + totals[shared[1]]
            totals |= dict.fromkeys(shared, once)
        for p, total_grad in totals.items():
            if total_grad is not None:
                p.grad = total_grad if p.grad is None else p.grad + total_grad
    if grid.tied:
        parameters = [p for p in parameters if p is not stages[-1].linear.weight]
    grads = {n: [p.grad for p in s.parameters()] for n, s in enumerate(stages)}
    whole_norm = nn.utils.clip_grad_norm_(parameters, math.inf)
    return Result(losses, grads, float(whole_norm))


@dataclass(frozen=True)
class Wrong:
    """What a grid of four ranks, two replicas of two devices, refuses, or ends at.

    Attributes:
        kind: of it.
    """

    kind: str


class Raising(nn.Linear):
    """Fails."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such word: 7")


def told(ranks: Ranks, wrong: Wrong) -> str:
    """What a rank says of it, which ends a company of its own."""
    company = Ranks(PrefixStore(f"{wrong}", ranks.store), ranks.rank, ranks.size)
    stages: list[Any] = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    torch.manual_seed(ranks.rank if wrong.kind == "values" else 0)
    for stage in stages:
        stage.reset_parameters()
    if wrong.kind == "raises" and ranks.rank == 3:
        stages[1] = Raising(WIDTH, WIDTH)
        torch.manual_seed(0)
        for stage in stages:
            stage.reset_parameters()
    schedule = catalog.make("1f1b", devices=2, micro_batches=2)
    x = torch.ones(4, WIDTH)
    try:
        replicas = 3 if wrong.kind == "three" else 2
        Pipeline(
            stages, schedule, same_values, ranks=company, data_parallel=replicas
        ).step(x, x[: 3 if wrong.kind == "rows" and ranks.rank > 1 else 4])
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        company.leave()
    return "nothing"
