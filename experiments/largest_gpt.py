"""The largest GPT in 8 GiB a device, with recomputation and without, and no device.

GPipe's story (Huang et al. 2018, arXiv:1811.06965, Table 1) at today's scale: a GPT of
some width gets as many blocks as a device has room for, or each of four. What a layer
keeps is counted on torch's meta device; `partition` finds cuts that fit, by the
prediction. Then the executor itself runs a step there, on meta tensors, and all bytes
that are alive on a device count, temporaries too.

    python experiments/largest_gpt.py       writes experiments/results/largest_gpt.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from amoebanet_count import apart, count_layer  # the path first
from live_bytes import LiveBytes

from pipeproof.exec import Pipeline, split_at
from pipeproof.exec.examples import gpt_layers, token_loss
from pipeproof.exec.tensors import mapped
from pipeproof.sched import (
    Action,
    Layer,
    ParameterError,
    Partition,
    Schedule,
    catalog,
    partition,
    recompute,
)

RESULT = Path(__file__).parent / "results" / "largest_gpt.md"
MEMORY = 8 << 30
BYTES_A_PARAMETER = 16
"""In float32, with its gradient and Adam's state."""
MOST_BLOCKS = 1024


@dataclass(frozen=True)
class Size:
    """Of a GPT, but for its number of blocks, and of a batch."""

    width: int = 1024
    heads: int = 16
    tokens: int = 1024
    vocabulary: int = 16384
    rows: int = 16

    def layers(self, blocks: int) -> list[nn.Module]:
        """Embedding, blocks, head."""
        return gpt_layers(
            vocabulary=self.vocabulary,
            tokens=self.tokens,
            width=self.width,
            layers=blocks,
            heads=self.heads,
            dropout=0.0,
        )

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Token ids, and the ids that follow them."""
        shape = self.rows, self.tokens + 1
        ids = torch.randint(self.vocabulary, shape, device=device)
        return ids[:, :-1], ids[:, 1:].contiguous()


@dataclass(frozen=True)
class Way:
    """How it is trained."""

    devices: int
    schedule: str
    micro_batches: int
    policy: str

    def planned(self) -> Schedule:
        """The schedule."""
        bare = catalog.make(
            self.schedule, devices=self.devices, micro_batches=self.micro_batches
        )
        return recompute(bare, self.policy)


WAYS = (
    Way(1, "gpipe", 1, "never"),
    Way(1, "gpipe", 16, "never"),
    Way(1, "gpipe", 16, "always"),
    Way(4, "gpipe", 16, "never"),
    Way(4, "gpipe", 16, "always"),
    Way(4, "1f1b", 16, "never"),
    Way(4, "1f1b", 16, "always"),
)


class WithLoss(nn.Module):
    """The head, and the loss as part of its stage."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """→ scalar."""
        targets = x.new_zeros(x.shape[:2], dtype=torch.int64)
        return token_loss(self.head(x), targets)


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, True
    )[0]


@contextmanager
def on_meta() -> Iterator[None]:
    """Tensors without data, and attention by the kernel that a GPU takes in float32.

    The meta device would take the one that keeps a number for each pair of positions.
    """
    name = "scaled_dot_product_attention"
    with torch.device("meta"), patch.object(functional, name, _attention):
        yield


@cache
def counted(size: Size, rows: int, blocks: int) -> list[Layer]:
    """Each layer, for a micro-batch of so many rows; blocks are alike.

    Where times should stand, there are FLOPs.
    """
    found = []
    with on_meta():
        embedding, block, head = size.layers(1)
        value: Any = torch.zeros(rows, size.tokens, dtype=torch.int64)
        for layer in (embedding, block, WithLoss(head)):
            one, output = count_layer(layer, value)
            found.append(
                Layer(
                    forward=one.flops,
                    backward=2 * one.flops,
                    weights=BYTES_A_PARAMETER * one.parameters,
                    activations=one.kept + one.input * one.keeps_input,
                    input=one.input,
                    keeps_input=one.keeps_input,
                )
            )
            value = apart(output)
    first, middle, last = found
    return [first, *[middle] * blocks, last]


def parameters(size: Size, blocks: int) -> int:
    """How many."""
    weights = sum(layer.weights for layer in counted(size, 1, blocks))
    return round(weights / BYTES_A_PARAMETER)


def predicted(size: Size, way: Way, blocks: int, memory: float) -> Partition | None:
    """Cuts with which each device has room; None if there are none."""
    schedule = way.planned()
    layers = counted(size, size.rows // way.micro_batches, blocks)
    try:
        return partition(layers, schedule, memory=memory)
    except ParameterError:
        return None


def largest(size: Size, way: Way, memory: float) -> tuple[int, Partition] | None:
    """The most blocks that fit by the prediction, found by halving."""
    low, high, best = way.devices - 2, MOST_BLOCKS + 1, None
    while high - low > 1:
        middle = (low + high) // 2
        found = predicted(size, way, middle, memory) if middle > 0 else None
        if found is None and middle > 0:
            high = middle
        else:
            low, best = middle, found
    return None if best is None else (low, best)


def executed(size: Size, way: Way, blocks: int, cuts: Sequence[int]) -> list[int]:
    """On each device, the most bytes that are alive in a step of the executor.

    In a later one than the first: gradients and Adam's state are there.
    """
    meter, moments = LiveBytes(), []
    with on_meta():
        stages = split_at(size.layers(blocks), list(cuts))
        x, y = size.batch("meta")
        pipeline = Pipeline(stages, way.planned(), token_loss, ["meta"] * way.devices)
        with meter:
            for meter.where, stage in enumerate(stages):
                stage.to_empty(device="meta")  # made anew, where it counts
                for parameter in stage.parameters():
                    parameter.grad = torch.empty_like(parameter)
                    moments += [torch.empty_like(parameter) for _ in range(2)]
            _as_devices(pipeline, meter)
            pipeline.step(x, y)
    return [meter.peak_of[device] for device in range(way.devices)]


def _as_devices(pipeline: Pipeline, meter: LiveBytes) -> None:
    """Have what an instruction makes count for its device, and messages be copies.

    Within one torch device a message is the sender's own tensor.
    """
    program, runtime = pipeline.program, pipeline._runtime
    values = runtime._space.values

    def around(index: int, run: Any) -> None:
        meter.where = int(program.device[index])
        run()
        if program.action[index] == Action.SEND:
            message = program.message_at(int(program.message[index]))
            meter.where = message.target
            write = program.writes[message.recv][0]
            values[write] = mapped(_copied, values[write])

    runtime._busy = [(i, partial(around, i, run)) for i, run in runtime._busy]


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def gib(size: float) -> str:
    """Of bytes."""
    return f"{size / (1 << 30):.2f}"


def in_all(
    size: Size, way: Way, blocks: int, memory: float
) -> tuple[int, list[int]] | None:
    """The most blocks that fit when the executor counts, and its count.

    Args:
        size: of the model.
        way: how it is trained.
        blocks: that fit by the prediction, which leaves temporaries out.
        memory: of each device.
    """
    while blocks > 0:
        cuts = predicted(size, way, blocks, memory)
        assert cuts is not None
        found = executed(size, way, blocks, cuts.sizes)
        excess = max(found) - memory
        if excess <= 0:
            return blocks, found
        one = counted(size, size.rows // way.micro_batches, 1)[1]
        blocks -= max(1, int(excess / (one.weights + 2 * one.activations)))
    return None


def row(size: Size, way: Way) -> list[str]:
    """Of the table."""
    name = "no pipeline" if way.devices == 1 else way.schedule
    again = "with" if way.policy == "always" else "without"
    cells = [f"{way.devices}", name, f"{way.micro_batches}", again]
    fit = largest(size, way, MEMORY)
    if fit is None:
        return [*cells, *["none", "", ""] * 2]
    blocks, cuts = fit
    cells += [f"{blocks}", f"{parameters(size, blocks) / 1e6:,.0f} M"]
    cells.append(gib(max(cuts.bytes)))
    if (counts := in_all(size, way, blocks, MEMORY)) is None:
        return [*cells, "none", "", ""]
    blocks, found = counts
    cells += [f"{blocks}", f"{parameters(size, blocks) / 1e6:,.0f} M"]
    return [*cells, gib(max(found))]


HEAD = """\
# The largest GPT in 8 GiB a device, counted without a device

A GPT of width {size.width}, with {size.heads} heads, {size.tokens:,} tokens and a
vocabulary of {size.vocabulary:,}, in float32 with Adam (16 bytes a parameter), with as
many blocks as there is room for; a batch of {size.rows} sequences in M micro-batches.
Attention keeps what a GPU's memory-efficient kernel keeps. Counted on the meta device
of torch {torch}: nothing is computed.

*Predicted*: parameters, gradients, Adam's state, activations, stored inputs and tensors
that wait at the cuts, by `partition`, which also chose the cuts. *Executed*: the
executor runs a step on meta tensors, and all that is alive on the fullest device
counts: temporaries, such as gradients within a layer, too. Both are the most blocks
that fit; GiB are those of the fullest device.
"""


def report(size: Size) -> str:
    """The table, and what it comes to."""
    titles = [
        *("devices", "schedule", "M", "recomputation", "predicted: blocks"),
        *("parameters", "GiB", "executed: blocks", "parameters", "GiB"),
    ]
    lines = [HEAD.format(size=size, torch=torch.__version__)]
    lines += ["| " + " | ".join(titles) + " |", "|-" * len(titles) + "|"]
    for way in WAYS:
        cells = row(size, way)
        print(*cells, sep=" | ", file=sys.stderr)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    text = report(Size())
    arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
