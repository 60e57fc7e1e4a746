"""Jobs that profile stages."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from pipeproof.exec import profile
from pipeproof.exec.group import Ranks
from pipeproof.exec.profile import Profile
from pipeproof.sched import catalog, with_steps


def small_stages(number: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        for _ in range(number)
    ]


def profiled(ranks: Ranks | None, name: str, steps: bool = False) -> Profile:
    """Leaves all as it was: gradients, and with STEPs weights and moments."""
    schedule = catalog.make(name, devices=2, micro_batches=2)
    schedule = with_steps(schedule) if steps else schedule
    stages, x = small_stages(schedule.stages), torch.randn(6, 8)
    stages[0][0].weight.grad = torch.ones(8, 8)
    optimizers = [torch.optim.Adam(stage.parameters(), lr=0.1) for stage in stages]
    optimizers[0].step()
    before = copy.deepcopy([*stages, *optimizers])
    found = profile(
        stages,
        schedule,
        functional.mse_loss,
        x,
        x,
        ranks=ranks,
        rounds=1,
        optimizers=optimizers if steps else None,
    )
    for now, was in zip([*stages, *optimizers], before):
        torch.testing.assert_close(now.state_dict(), was.state_dict(), rtol=0, atol=0)
    assert stages[0][0].weight.grad.sum() == 64, "gradients are as they were"
    assert stages[1][0].weight.grad is None
    return found


def profiled_with_steps(ranks: Ranks | None, name: str) -> Profile:
    return profiled(ranks, name, steps=True)
