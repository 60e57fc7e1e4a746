"""Two small models to try a schedule on: `pipeproof run --model mlp|gpt`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec.batch import Value
from pipeproof.exec.partition import split_evenly


@dataclass(frozen=True)
class Example:
    """A model in stages, a batch for it, and its loss.

    Attributes:
        stages: one for each stage of the schedule.
        inputs, targets: a batch.
        loss_fn: a mean over rows, and over positions where there are any.
    """

    stages: list[nn.Sequential]
    inputs: Value
    targets: Value
    loss_fn: Callable[[Any, Any], Tensor]


def mlp(
    stages: int,
    *,
    batch: int = 64,
    width: int = 64,
    slices: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Example:
    """A regression: one linear layer and a tanh for each stage.

    Inputs and targets have shape (batch, width); for several slices (batch, 4 ×
    slices, width).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh())
            for _ in range(stages)
        ]
        shape = (batch, width) if slices == 1 else (batch, 4 * slices, width)
        inputs = torch.randn(shape, dtype=dtype)
        targets = torch.sin(inputs.roll(1, dims=-1))
    return Example(layers, inputs, targets, functional.mse_loss)


class Embedding(nn.Module):
    """Token and position embeddings: (batch, tokens) → (batch, tokens, width).

    Its carry is the position of the next slice's first token.
    """

    takes_carry = True

    def __init__(self, vocabulary: int, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(tokens, width)

    def forward(self, ids: Tensor, carry: Any = None) -> Any:
        """Sum of the two embeddings."""
        if carry is None:
            return self.token(ids) + self.position.weight[: ids.shape[1]]
        first = carry if isinstance(carry, Tensor) else torch.zeros_like(ids[0, 0])
        at = first + torch.arange(ids.shape[1], device=ids.device)
        return self.token(ids) + self.position(at), at[-1] + 1


class Block(nn.Module):
    """A pre-norm transformer block with causal attention.

    Its carry is the keys and values so far: two of (batch, heads, tokens, width of
    a head).
    """

    takes_carry = True

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

    def forward(self, x: Tensor, carry: Any = None) -> Any:
        """(batch, tokens, width) → the same shape."""
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=2)
        )
        seen = None
        if carry:
            k, v = torch.cat([carry[0], k], 2), torch.cat([carry[1], v], 2)
            # The last query sees all keys, each one before it one less.
            all_seen = torch.ones(
                q.shape[2], k.shape[2], dtype=torch.bool, device=q.device
            )
            seen = all_seen.tril(k.shape[2] - q.shape[2])
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None
        )
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.mlp(self.norm_2(x)))
        return x if carry is None else (x, (k, v))


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
    slices: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Example:
    """A byte-level GPT with dropout, on random bytes.

    Inputs and targets have shape (batch, tokens), 64 tokens or as many as slices.
    """
    tokens = max(64, slices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = gpt_layers(layers=max(6, stages - 2), tokens=tokens)
        model = split_evenly(layers, stages)
        ids = torch.randint(256, (batch, tokens + 1))
    parts = [part.to(dtype) for part in model]
    return Example(parts, ids[:, :-1], ids[:, 1:].contiguous(), token_loss)


EXAMPLES: dict[str, Callable[..., Example]] = {"mlp": mlp, "gpt": gpt}
