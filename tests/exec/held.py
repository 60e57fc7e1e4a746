"""What ranks hold of a GPT and of a residual network, of which some runs again."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from convnets import residual_stages
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import ActivationMeter, Pipeline, Ranks, split_at
from pipeproof.exec.examples import gpt_layers
from pipeproof.sched import Schedule


def gpt() -> list[nn.Module]:
    torch.manual_seed(0)
    return gpt_layers(width=64, layers=6, dropout=0.0)


def tokens(micro_batches: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(2 * micro_batches * 64).reshape(-1, 64) % 251
    return ids, ids.roll(-1, 1)


def of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def resnet() -> list[nn.Module]:
    return list(residual_stages(1)[0])


def maps(micro_batches: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows = 16 * micro_batches
    return torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10


MODELS = {
    "gpt": (gpt, tokens, of_tokens),
    "resnet": (resnet, maps, functional.cross_entropy),
}
"""Of each its layers, a batch of so many micro-batches, and its loss."""


@dataclass(frozen=True)
class Held:
    """A model in stages, of which an R runs some layers again.

    Attributes:
        model: which.
        schedule: with its R.
        sizes: layers in each stage.
        recomputed: of each stage, the layers that run again.
    """

    model: str
    schedule: Schedule
    sizes: tuple[int, ...]
    recomputed: tuple[tuple[int, ...], ...]


def peak_of(ranks: Ranks, held: Held) -> int:
    """The most bytes of activations and stage inputs that this rank keeps."""
    layers, batch_of, loss = MODELS[held.model]
    stages = split_at(layers(), held.sizes)
    pipeline = Pipeline(
        stages, held.schedule, loss, ranks=ranks, recomputed=held.recomputed
    )
    batch = batch_of(held.schedule.micro_batches)
    gc.disable()  # nothing may wait for it
    try:
        with ActivationMeter(stages) as meter:
            meter.ignore(*batch)
            pipeline.step(*batch)
        assert meter.live == 0
    finally:
        gc.enable()
    return meter.peak
