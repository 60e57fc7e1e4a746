"""Training under FSDP2, also with what other executors forgot of it left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from grids import Grid, joined, plain, whole
from jobs import digest, same_values
from torch import Tensor, nn

from pipeproof.exec import Pipeline, reference
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.exec.sharded import Sharded

STEPS = 3
REPLICAS, DEVICES = 2, 2


@dataclass(frozen=True)
class Training:
    """Steps of two replicas with an optimizer of torch's.

    Attributes:
        forgotten: what of FSDP2 does not happen in the first step, after which
            nothing more is done.
    """

    forgotten: str = ""

    @property
    def grid(self) -> Grid:
        """Interleaved, two devices of two stages each; sums, so that no row weighs."""
        rows = {"": (5, 5), "callback": (6, 6), "reduction": (7, 7)}[self.forgotten]
        return Grid(
            "interleaved", DEVICES, 4, rows, "never", plain, "sum", 1, True, True
        )


@dataclass(frozen=True)
class Trained:
    """What must be equal, bit by bit.

    Attributes:
        grads: of each stage here, after each step.
        weights: at the end.
        finished: how often FSDP2 has ended a backward here.
        whole: parameters that were left gathered, after each step.
    """

    grads: list[dict[int, str]]
    weights: dict[int, str]
    finished: int = 0
    whole: int = 0


def optimizer(stages: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for stage in stages for p in stage.parameters()]
    return torch.optim.SGD(parameters, 0.1, momentum=0.9, foreach=False)


def trained(ranks: Ranks, job: Training) -> Trained:
    """As one of the ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    grid = job.grid
    given, stages, schedule = joined(ranks, grid), grid.stages(), grid.schedule
    replica, device = divmod(ranks.rank, grid.devices)
    mine = [n for n in range(len(stages)) if device in holders(schedule, n)]
    for number in mine:
        fully_shard(stages[number], mesh=given["data_parallel"])
    optimize = optimizer([stages[n] for n in mine])
    finish: Callable[[Any], None] = FSDPState._root_post_backward_final_callback
    finished = left_whole = 0

    def counted(state: Any) -> None:
        nonlocal finished
        finished += 1
        if job.forgotten != "callback" or not state._state_ctx.is_last_backward:
            finish(state)

    grads: list[dict[int, str]] = []
    with ExitStack() as stack:
        stack.enter_context(
            patch.object(FSDPState, "_root_post_backward_final_callback", counted)
        )
        if job.forgotten == "reduction":
            stack.enter_context(
                patch.object(Sharded, "before_last", lambda self, run: run)
            )
        pipeline = Pipeline(stages, schedule, same_values, loss_scale="sum", **given)
        for step in range(1 if job.forgotten else STEPS):
            if step != 1:  # the second adds to the first
                optimize.zero_grad()
            pipeline.step(*batch(grid, replica, step))
            grads.append({n: of([p.grad for p in parameters(stages[n])]) for n in mine})
            left_whole += sum(
                not hasattr(p, "full_tensor")
                for n in mine
                for p in parameters(stages[n])
            )
            if not job.forgotten:
                optimize.step()
    weights = {n: of(parameters(stages[n])) for n in mine}
    Ranks.among(range(ranks.size)).leave()
    dist.destroy_process_group()
    return Trained(grads, weights, finished, left_whole)


def batch(grid: Grid, replica: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = grid.batch(replica)
    return x + step, y


def parameters(stage: nn.Module) -> list[nn.Parameter]:
    return list(stage.parameters())


def of(tensors: list[Any]) -> str:
    return digest(*(None if t is None else whole(t).detach() for t in tensors))


def unsharded(job: Training) -> Trained:
    """Each replica's reference on its own rows, and their sum, in one process."""
    grid = job.grid
    stages = grid.stages()
    optimize = optimizer(stages)
    grads: list[dict[int, str]] = []
    for step in range(STEPS):
        if step != 1:
            optimize.zero_grad()
        found = []
        for replica in range(REPLICAS):
            twins = copy.deepcopy(stages)
            for twin in twins:
                twin.zero_grad()
            given = batch(grid, replica, step)
            reference(
                twins,
                grid.schedule,
                same_values,
                *given,
                loss_scale="sum",
                replica=replica,
            )
            found.append([p.grad for twin in twins for p in parameters(twin)])
        every = [p for stage in stages for p in parameters(stage)]
        for p, one, other in zip(every, *found):
            total = one + other
            p.grad = total if p.grad is None else p.grad + total
        grads.append(
            {n: of([p.grad for p in parameters(s)]) for n, s in enumerate(stages)}
        )
        optimize.step()
    return Trained(grads, {n: of(parameters(s)) for n, s in enumerate(stages)})
