"""Ours against torchgpipe: GPipe in one process, without recomputation and with it.

A step of ours and a step of theirs in turn, with the same stages, micro-batches and
batch, all stages on the CPU; their gradients are compared first. torchgpipe runs each
stage in a thread of its own; ours runs them all in one. Needs `pip install
torchgpipe`, which is no dependency of this package.

    python experiments/executor/against_torchgpipe.py
        writes experiments/results/against_torchgpipe.md
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchgpipe import GPipe

from pipeproof.exec import Pipeline
from pipeproof.sched import catalog, recompute

sys.path.append(str(Path(__file__).parent))
from against_torch import MODELS

RESULT = Path(__file__).parent.parent / "results" / "against_torchgpipe.md"
STAGES, MICRO_BATCHES = 4, 8
WARM = 3
POLICIES = {"never": "never", "except-last": "except_last", "always": "always"}
"""Our names of when to recompute → theirs."""


def row(model: str, policy: str, rounds: int) -> str:
    """A line of the table."""
    make, shape, factor = MODELS[model]
    torch.manual_seed(0)
    stages = make(STAGES, shape[-1])
    twins = copy.deepcopy(stages)
    x, y = torch.randn(2, MICRO_BATCHES * shape[0], *shape[1:])
    schedule = catalog.make("gpipe", devices=STAGES, micro_batches=MICRO_BATCHES)
    ours = Pipeline(stages, recompute(schedule, policy), functional.mse_loss)
    theirs = GPipe(
        nn.Sequential(*twins),
        balance=[1] * STAGES,
        devices=["cpu"] * STAGES,
        chunks=MICRO_BATCHES,
        checkpoint=POLICIES[policy],
    )

    def their_step(x: Tensor, y: Tensor) -> None:
        functional.mse_loss(theirs(x), y).backward()

    ways: dict[str, Callable[[Tensor, Tensor], object]] = {
        "ours": ours.step,
        "theirs": their_step,
    }
    walls: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(-WARM, rounds * factor):
        for way, step in ways.items():
            wall, spent = time.perf_counter(), time.process_time()
            step(x, y)
            if round_ >= 0:
                walls[way].append(time.perf_counter() - wall)
                cpu[way].append(time.process_time() - spent)
        if round_ == -WARM:
            for mine, other in zip(stages, twins):
                for a, b in zip(mine.parameters(), other.parameters()):
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    pairs = zip(walls["ours"], walls["theirs"])
    cells = [model, policy]
    cells += [f"{statistics.median(walls[way]) * 1e3:.2f}" for way in ways]
    cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    cells += [f"{statistics.median(cpu[way]) * 1e3:.2f}" for way in ways]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each way")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = [
        "# Ours against torchgpipe",
        "",
        f"One process, {STAGES} stages, {MICRO_BATCHES} micro-batches, on one shared "
        f"x86-64 machine of {os.cpu_count()} cores, torch {torch.__version__} with one "
        f"thread for each op, torchgpipe {version('torchgpipe')}, float32.",
        f"Medians over {arguments.rounds} rounds and more for tiny models, a step of "
        "ours and a step of theirs in turn; gradients agree. torchgpipe has a thread "
        "for each stage, which may use both cores; ours has one for all.",
        "",
        "| model | recompute | ours, ms | theirs, ms | ratio | CPU, ms: ours | theirs "
        "|",
        "|-|-|-|-|-|-|-|",
    ]
    for model in MODELS:
        for policy in POLICIES:
            text.append(row(model, policy, arguments.rounds))
            print(text[-1], file=sys.stderr)
    arguments.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
