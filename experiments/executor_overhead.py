"""What the executor adds to a bare loop over micro-batches, in one run.

Three ways to the same gradients, in turn, many times: the bare loop (the whole
model, micro-batch by micro-batch, `loss.backward()`), the pipeline, and the
least that stages need (a hand-written loop that detaches at each boundary and
calls backward stage by stage, with none of a framework's duties), which costs
more where forwards and backwards alternate.

    make experiments         writes experiments/results/executor_overhead.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.exec import Pipeline
from pipeproof.sched import POLICIES, catalog, lower, recompute

RESULT = Path(__file__).parent / "results" / "executor_overhead.md"
STAGES, MICRO_BATCHES = 4, 8


def model(width: int, layers: int) -> list[nn.Sequential]:
    """Stages of linear layers with a tanh each."""
    torch.manual_seed(0)
    return [
        nn.Sequential(
            *(
                layer
                for _ in range(layers)
                for layer in (nn.Linear(width, width), nn.Tanh())
            )
        )
        for _ in range(STAGES)
    ]


def bare(stages: list[nn.Sequential], x: Tensor, y: Tensor) -> None:
    """The whole model, one micro-batch after the other."""
    whole = nn.Sequential(*stages)
    for a, b in zip(x.tensor_split(MICRO_BATCHES), y.tensor_split(MICRO_BATCHES)):
        loss = functional.mse_loss(whole(a), b) * (len(a) / len(x))
        loss.backward()


Order = list[tuple[int, int, str]]
"""(micro-batch, stage, kind) of each op, one after the other."""


def stage_by_stage() -> Order:
    """Micro-batch by micro-batch: down all stages and up again."""
    down = [(s, "F") for s in range(STAGES)]
    up = [(s, "B") for s in reversed(range(STAGES))]
    return [(m, s, k) for m in range(MICRO_BATCHES) for s, k in [*down, *up]]


def as_scheduled(name: str) -> Order:
    """The order in which one process runs a schedule."""
    program = lower(catalog.make(name, devices=STAGES, micro_batches=MICRO_BATCHES))
    ops = (op for instruction in program for op in instruction.ops)
    return [(op.micro_batch, op.stage, op.kind.name) for op in ops]


def by_hand(stages: list[nn.Sequential], x: Tensor, y: Tensor, order: Order) -> None:
    """Detach at each boundary, backward stage by stage, and nothing else."""
    inputs, targets = x.tensor_split(MICRO_BATCHES), y.tensor_split(MICRO_BATCHES)
    leaves: dict[tuple[int, int], Tensor] = {}
    outputs: dict[tuple[int, int], Tensor] = {}
    for m, s, kind in order:
        if kind == "B":
            gradient = leaves.pop((m, s + 1)).grad if s < STAGES - 1 else None
            outputs.pop((m, s)).backward(gradient)
            continue
        leaf = outputs[m, s - 1].detach().requires_grad_() if s else inputs[m]
        output = stages[s](leaf)
        if s == STAGES - 1:
            scale = len(leaf) / len(x)
            output = functional.mse_loss(output, targets[m]) * scale
        leaves[m, s], outputs[m, s] = leaf, output


def medians(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, taken in turn."""
    for way in ways.values():
        for _ in range(3):
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        print(f"\r  round {round_ + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    print("\r" + " " * 30 + "\r", end="", file=sys.stderr)
    return times


def measure(width: int, rows: int, layers: int, rounds: int) -> list[str]:
    """A row of the table for each recompute policy and schedule."""
    stages = model(width, layers)
    x, y = torch.randn(2, rows * MICRO_BATCHES, width)
    plain, lifo, alternating = (
        stage_by_stage(),
        as_scheduled("gpipe"),
        as_scheduled("1f1b"),
    )
    ways: dict[str, Callable[[], None]] = {
        "bare loop": lambda: bare(stages, x, y),
        "by hand, stage by stage": lambda: by_hand(stages, x, y, plain),
        "by hand, in gpipe's order": lambda: by_hand(stages, x, y, lifo),
        "by hand, in 1f1b's order": lambda: by_hand(stages, x, y, alternating),
    }
    for name in ("gpipe", "1f1b"):
        for policy in POLICIES if name == "gpipe" else ("never",):
            schedule = catalog.make(name, devices=STAGES, micro_batches=MICRO_BATCHES)
            pipeline = Pipeline(
                stages, recompute(schedule, policy), functional.mse_loss
            )
            ways[f"{name}, recompute {policy}"] = lambda p=pipeline: p.step(x, y)  # type: ignore[misc]
    times = medians(ways, rounds)
    base = times["bare loop"]
    lines = []
    for name, seconds in times.items():
        ratio = statistics.median(s / b for s, b in zip(seconds, base))
        extra = statistics.median(s - b for s, b in zip(seconds, base))
        per_op = extra / (STAGES * MICRO_BATCHES) * 1e6
        lines.append(
            f"| {name} | {statistics.median(seconds) * 1e3:.3f} | {ratio:.3f} | "
            f"{per_op:.1f} |"
        )
    return lines


def main() -> None:
    """Measure both models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="of each way")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "# Executor overhead",
        "",
        f"Medians over rounds in turn; {STAGES} stages, "
        f"{MICRO_BATCHES} micro-batches, one CPU thread of a shared x86-64 machine, "
        f"torch {torch.__version__}.",
        "Extra: time beyond the bare loop per (stage, micro-batch), in microseconds.",
        "With recomputation it includes the forwards that are run again.",
    ]
    for title, width, rows, layers, factor in (
        ("Tiny: width 8, 4 rows a micro-batch, 1 layer a stage", 8, 4, 1, 10),
        ("Large: width 512, 128 rows a micro-batch, 2 layers a stage", 512, 128, 2, 1),
    ):
        text += ["", f"## {title}", "", "| way | ms | ratio | extra |", "|-|-|-|-|"]
        text += measure(width, rows, layers, arguments.rounds * factor)
    arguments.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
