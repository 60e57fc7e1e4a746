"""A residual network in stages, and a job that counts what it keeps."""

from __future__ import annotations

import torch
from real_work import Residual
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline, split_evenly
from pipeproof.exec.group import Ranks
from pipeproof.exec.homes import holders
from pipeproof.sched import Schedule

ROWS = 16
"""Of a micro-batch of images."""


def residual_stages(number: int) -> list[nn.Sequential]:
    """12 blocks with batch norm; they end with a ReLU, which keeps its output."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        layers.append(Residual(inputs, outputs, outputs // inputs))
        layers += [Residual(outputs, outputs, 1) for _ in range(3)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return split_evenly([*layers, nn.Sequential(*head)], number)


def peak_of_a_convnet(ranks: Ranks, schedule: Schedule) -> int:
    """The most bytes of activations and stage inputs that this rank keeps."""
    stages = residual_stages(schedule.stages)
    mine = [n for n in range(len(stages)) if ranks.rank in holders(schedule, n)]
    given = [stage if n in mine else None for n, stage in enumerate(stages)]
    pipeline = Pipeline(given, schedule, functional.cross_entropy, ranks=ranks)
    x, labels = images(ROWS * schedule.micro_batches)
    with ActivationMeter([stages[n] for n in mine]) as meter:
        meter.ignore(x, labels)
        pipeline.step(x, labels)
    assert meter.live == 0
    return meter.peak


def images(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10
