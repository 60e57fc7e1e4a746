"""What it costs to run a backward in two halves: (I + W) / B.

One stage, its forward not timed. Ways to the same gradients, in turn, many times: one
call of `torch.autograd.backward` (B), and one of the engine behind it, as the executor
calls it (bare); our `Splitter`; and the split
inside torch.distributed.pipelining, `stage_backward_input` and
`stage_backward_weight`, which are private there. And what is alive between I and
W: saved tensors and the stage's input, and gradients that wait for W.

    python experiments/executor/split_backward.py
        writes experiments/results/split_backward.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import (
    stage_backward_input,
    stage_backward_weight,
)

from pipeproof.exec import ActivationMeter, keep_memory
from pipeproof.exec.engine import backward
from pipeproof.exec.examples import Block
from pipeproof.exec.split import Splitter

RESULT = Path(__file__).parent.parent / "results" / "split_backward.md"

Halves = tuple[float, float]
"""Seconds of I and of W; of B and 0."""
Way = Callable[[Tensor, Tensor, Tensor], Halves]
"""(input, output, gradient of the output) → its time."""


def mlp(layers: int, width: int) -> nn.Module:
    """Linear layers with a tanh each."""
    pairs = ((nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def blocks(layers: int, width: int) -> nn.Module:
    """Transformer blocks, four heads each."""
    return nn.Sequential(*(Block(width, 4, dropout=0.0) for _ in range(layers)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "MLP, 4 layers of width 512, 16 rows": (lambda: mlp(4, 512), (16, 512), 4),
    "MLP, 4 layers of width 512, 128 rows": (lambda: mlp(4, 512), (128, 512), 1),
    "transformer, 2 blocks of width 256, 4 × 64 tokens": (
        lambda: blocks(2, 256),
        (4, 64, 256),
        1,
    ),
    "transformer, 2 blocks of width 512, 4 × 128 tokens": (
        lambda: blocks(2, 512),
        (4, 128, 512),
        0.25,
    ),
    "tiny MLP, 1 layer of width 8, 4 rows": (lambda: mlp(1, 8), (4, 8), 20),
    "tiny MLP, 2 layers of width 8, 4 rows": (lambda: mlp(2, 8), (4, 8), 20),
}
"""Name → the stage, the shape of its input, and how many times the rounds."""


def whole(leaf: Tensor, output: Tensor, gradient: Tensor) -> Halves:
    """B."""
    start = time.thread_time()
    torch.autograd.backward(output, gradient)
    return time.thread_time() - start, 0.0


def bare(leaf: Tensor, output: Tensor, gradient: Tensor) -> Halves:
    """B, as the executor calls it."""
    start = time.thread_time()
    backward([output], [gradient])
    return time.thread_time() - start, 0.0


def ours(splitter: Splitter) -> Way:
    """I and W by our splitter."""

    def run(leaf: Tensor, output: Tensor, gradient: Tensor) -> Halves:
        start = time.thread_time()
        _, rest = splitter.input_grads([output], [gradient], [leaf])
        middle = time.thread_time()
        rest.run()
        return middle - start, time.thread_time() - middle

    return run


def theirs(stage: nn.Module) -> Way:
    """I and W by torch's."""

    def run(leaf: Tensor, output: Tensor, gradient: Tensor) -> Halves:
        start = time.thread_time()
        parameters = stage.parameters()
        _, groups = stage_backward_input([output], [gradient], [leaf], parameters)
        middle = time.thread_time()
        stage_backward_weight(stage.parameters(), groups)
        return middle - start, time.thread_time() - middle

    return run


def in_turn(
    stage: nn.Module, shape: tuple[int, ...], ways: dict[str, Way], rounds: int
) -> dict[str, list[Halves]]:
    """Times of each way in each round; the first rounds are not counted."""
    times: dict[str, list[Halves]] = {name: [] for name in ways}
    x, gradient = torch.randn(2, *shape)
    for round_ in range(-5, rounds):
        for name, way in ways.items():
            leaf = x.detach().requires_grad_()
            output = stage(leaf)
            halves = way(leaf, output, gradient)
            if round_ >= 0:
                times[name].append(halves)
    return times


def row(name: str, rounds: int) -> str:
    """A line of the table."""
    make, shape, factor = MODELS[name]
    torch.manual_seed(0)
    stage = make()
    ways = {"B": whole, "bare": bare, "ours": ours(Splitter()), "theirs": theirs(stage)}
    times = in_turn(stage, shape, ways, round(rounds * factor))
    cells = [name]
    for way in ("B", "bare"):
        cells.append(f"{statistics.median(b for b, _ in times[way]) * 1e6:.0f}")
    for way in ("ours", "theirs"):
        for half in (0, 1):
            cells.append(f"{statistics.median(t[half] for t in times[way]) * 1e6:.0f}")
        ratios = [sum(t) / b for t, (b, _) in zip(times[way], times["B"])]
        cells.append(f"{statistics.median(ratios):.2f}")
    return "| " + " | ".join(cells) + " |"


def between(name: str) -> str:
    """A line of the table of memory."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    stage = make()
    cells = [name]
    for way in (_after_ours, _after_theirs):
        with ActivationMeter([stage]) as meter:
            leaf = torch.randn(shape, requires_grad=True)
            output = stage(leaf)
            roots, gradients = [output], [torch.randn(shape)]
            after_f = meter.live
            del output
            rest = way(stage, roots, gradients, leaf)
            parts = {id(g.untyped_storage()): g.untyped_storage() for g in rest[1]}
            sizes = [meter.live, sum(part.nbytes() for part in parts.values())]
            del rest
        if way is _after_ours:
            cells.append(f"{after_f / 1024:.1f}")
        cells += [f"{size / 1024:.1f}" for size in sizes]
    return "| " + " | ".join(cells) + " |"


Between = tuple[object, list[Tensor]]
"""All that W needs; the gradients in it."""


def _after_ours(
    stage: nn.Module, roots: list[Tensor], gradients: list[Tensor], leaf: Tensor
) -> Between:
    _, rest = Splitter().input_grads(roots, gradients, [leaf])
    roots.clear()
    return rest, [g for _, caught, _ in rest.calls for g in caught] + rest.gradients


def _after_theirs(
    stage: nn.Module, roots: list[Tensor], gradients: list[Tensor], leaf: Tensor
) -> Between:
    _, groups = stage_backward_input(roots, gradients, [leaf], stage.parameters())
    roots.clear()
    caught = [g for group in groups for parts in group["grads"] for g in parts]
    return groups, [gradient for gradient in caught if gradient is not None]


def main() -> None:
    """Measure all models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="of each way")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()  # as ranks do
    text = [
        "# A backward in two halves",
        "",
        "Microseconds of processor time, medians over rounds in turn; one thread on a "
        f"shared x86-64 machine with {os.cpu_count()} cores, torch "
        f"{torch.__version__}, float32.",
        "The process keeps the memory that it frees, as ranks do.",
        "B: `torch.autograd.backward`; bare: autograd's engine alone, as the executor "
        "calls it for a whole backward. "
        "Ratio: (I + W) / B, the median over rounds. Theirs: "
        "`stage_backward_input` and `stage_backward_weight` of "
        "torch.distributed.pipelining.",
        "",
        "| stage | B | bare | ours: I | W | ratio | theirs: I | W | ratio |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for name in MODELS:
        print(name, file=sys.stderr)
        text.append(row(name, arguments.rounds))
    text += [
        "",
        "Between I and W, in KiB: saved tensors with the stage's input, and gradients "
        "that wait for W.",
        "",
        "| stage | saved by F | ours: saved | waiting | theirs: saved | waiting |",
        "|-|-|-|-|-|-|",
        *(between(name) for name in MODELS),
    ]
    arguments.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
