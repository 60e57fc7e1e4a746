"""Two small models to try a schedule on: `pipeproof run --model mlp|gpt`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec.batch import Value
from pipeproof.exec.partition import split_evenly
from pipeproof.exec.runtime import LossFn


@dataclass(frozen=True)
class Example:
    """A model in stages, a batch for it, and its loss.

    Attributes:
        stages: one for each stage of the schedule.
        inputs, targets: a batch.
        loss_fn: a mean over rows.
    """

    stages: list[nn.Sequential]
    inputs: Value
    targets: Value
    loss_fn: LossFn


def mlp(
    stages: int,
    *,
    batch: int = 64,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Example:
    """A regression: one linear layer and a tanh for each stage.

    Inputs and targets have shape (batch, width).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh())
            for _ in range(stages)
        ]
        inputs = torch.randn(batch, width, dtype=dtype)
        targets = torch.sin(inputs.roll(1, dims=1))
    return Example(layers, inputs, targets, functional.mse_loss)


class Embedding(nn.Module):
    """Token and position embeddings: (batch, tokens) → (batch, tokens, width)."""

    def __init__(self, vocabulary: int, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(tokens, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Sum of the two embeddings."""
        return self.token(ids) + self.position.weight[: ids.shape[1]]  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → the same shape."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm_2(x)))  # type: ignore[no-any-return]


def gpt_layers(
    *,
    vocabulary: int = 256,
    tokens: int = 64,
    width: int = 64,
    layers: int = 6,
    heads: int = 4,
    dropout: float = 0.1,
) -> list[nn.Module]:
    """A GPT as a list of layers: embedding, blocks, head."""
    return [
        Embedding(vocabulary, tokens, width),
        *(Block(width, heads, dropout) for _ in range(layers)),
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)),
    ]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(
    stages: int,
    *,
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Example:
    """A byte-level GPT with dropout, on random bytes: (batch, 64) → (batch, 64)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = gpt_layers(layers=max(6, stages - 2))
        model = split_evenly(layers, stages)
        ids = torch.randint(256, (batch, 65))
    parts = [part.to(dtype) for part in model]
    return Example(parts, ids[:, :-1], ids[:, 1:].contiguous(), token_loss)


EXAMPLES: dict[str, Callable[..., Example]] = {"mlp": mlp, "gpt": gpt}
