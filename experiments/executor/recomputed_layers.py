"""Recomputing layers instead of stages: bytes and time, predicted and measured.

The layers of a GPT and of a residual network are profiled one by one. For five
schedules, and a memory of activations between what it takes to keep all and to
recompute all, `fit_selective` and `fit_recompute` choose what is recomputed, and from
the profile the simulator predicts each rank's peak bytes and the step's work. Two
ranks then run the same, where an ActivationMeter counts, and one process, for the time.

    python experiments/executor/recomputed_layers.py
        writes experiments/results/recomputed_layers.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_work import Residual  # the path first

from pipeproof.cli.profiling import peaks_of
from pipeproof.exec import (
    ActivationMeter,
    Pipeline,
    Ranks,
    launch,
    profile_layers,
    split_at,
    split_evenly,
)
from pipeproof.exec.examples import gpt_layers
from pipeproof.sched import (
    POLICIES,
    Layer,
    Schedule,
    catalog,
    fit_recompute,
    fit_selective,
    merge_backward,
    recompute,
)
from pipeproof.sched.fit_recompute import selective_loads
from pipeproof.sim import Cost, cost_of_layers, simulate

RESULT = Path(__file__).parents[1] / "results" / "recomputed_layers.md"
RANKS, MICRO_BATCHES = 2, 8
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "interleaved")
SHARE = 0.5
"""Of the way from the memory of recomputing all to that of keeping all."""
Layers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        name: to say which.
        layers: makes them.
        batch: makes inputs and targets of some micro-batches.
        loss: of outputs and targets.
    """

    name: str
    layers: Callable[[], list[nn.Module]]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def gpt() -> list[nn.Module]:
    """14 layers."""
    torch.manual_seed(0)
    return gpt_layers(width=128, layers=12, dropout=0.0)


def tokens(micro_batches: int) -> tuple[Tensor, Tensor]:
    """4 × 64 of them in each."""
    torch.manual_seed(1)
    ids = torch.randint(256, (4 * micro_batches, 64))
    return ids, ids.roll(-1, 1)


def of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy."""
    return functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def resnet() -> list[nn.Module]:
    """14 layers."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    found: list[nn.Module] = [stem]
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        found.append(Residual(inputs, outputs, outputs // inputs))
        found += [Residual(outputs, outputs, 1) for _ in range(3)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return [*found, nn.Sequential(*head)]


def images(micro_batches: int) -> tuple[Tensor, Tensor]:
    """16 of 16×16 in each."""
    torch.manual_seed(1)
    rows = 16 * micro_batches
    return torch.randn(rows, 1, 16, 16), torch.arange(rows) % 10


MODELS = {
    "GPT": Model("GPT", gpt, tokens, of_tokens),
    "ResNet": Model("ResNet", resnet, images, functional.cross_entropy),
}


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        policy: in the table.
        schedule: with its R.
        layers: that are recomputed; None for whole stages.
    """

    policy: str
    schedule: Schedule
    layers: Layers | None = None


def plans(name: str, layers: list[Layer], sizes: list[int]) -> list[Plan]:
    """Keep all, recompute all, and what fits in between: stages, and layers."""
    bare = catalog.make(name, devices=RANKS, micro_batches=MICRO_BATCHES)
    found = [Plan(policy, recompute(bare, policy)) for policy in POLICIES]
    every = [tuple(range(size)) for size in sizes]
    most, least = (
        selective_loads(layers, plan.schedule, sizes, every)[1] for plan in found[:2]
    )
    memory = [low + SHARE * (high - low) for low, high in zip(least, most)]
    stages = fit_recompute(bare, layers, sizes, memory)
    chosen = fit_selective(bare, layers, sizes, memory)
    sure = "" if chosen.exact else ", perhaps not fastest"
    found.append(Plan("fits: stages", stages))
    found.append(Plan(f"fits: layers{sure}", chosen.schedule, chosen.layers))
    return found


def sizes_of(name: str, layers: int) -> list[int]:
    """Layers in each stage, as even as can be."""
    stages = catalog.make(name, devices=RANKS, micro_batches=MICRO_BATCHES).stages
    return [len(stage) for stage in split_evenly([nn.Identity()] * layers, stages)]


def profiled(model: Model) -> list[Layer]:
    """Each layer, for one micro-batch."""
    torch.set_num_threads(1)
    inputs, targets = model.batch(1)
    return profile_layers(model.layers(), inputs, loss_fn=model.loss, targets=targets)


def predicted(plan: Plan, cost: Cost) -> tuple[list[int], float]:
    """Peak bytes of each device, and how long all are busy together.

    An I that its W follows at once is run as one.
    """
    trace = simulate(merge_backward(plan.schedule), cost)
    return peaks_of(trace, shared=False), float(sum(cost.durations(trace.program)))


def measured(
    ranks: Ranks, which: str, sizes: list[int], wanted: list[Plan]
) -> list[int]:
    """On each rank: peak bytes of each plan."""
    torch.set_num_threads(1)
    model = MODELS[which]
    stages = split_at(model.layers(), sizes)
    x, y = model.batch(MICRO_BATCHES)
    peaks = []
    for plan in wanted:
        one = Pipeline(
            stages, plan.schedule, model.loss, ranks=ranks, recomputed=plan.layers
        )
        one.step(x, y)
        with ActivationMeter(stages) as meter:
            meter.ignore(x, y)
            one.step(x, y)
        peaks.append(meter.peak)
    return peaks


def timed(
    model: Model, sizes: list[int], wanted: list[Plan], rounds: int
) -> list[float]:
    """Processor time of a step of each plan, in one process; the least of some."""
    stages = split_at(model.layers(), sizes)
    x, y = model.batch(MICRO_BATCHES)
    pipelines = [
        Pipeline(stages, plan.schedule, model.loss, recomputed=plan.layers)
        for plan in wanted
    ]
    times = [float("inf")] * len(pipelines)
    for _ in range(1 + rounds):
        for number, one in enumerate(pipelines):
            began = time.process_time()
            one.step(x, y)
            times[number] = min(times[number], time.process_time() - began)
    return times


def rows(model: Model, rounds: int) -> list[list[str]]:
    """Of the table."""
    layers = profiled(model)
    found = []
    for name in SCHEDULES:
        sizes = sizes_of(name, len(layers))
        wanted = plans(name, layers, sizes)
        of_ranks = launch(measured, RANKS, model.name, sizes, wanted)
        times = timed(model, sizes, wanted, rounds)
        base = 0.0
        for number, plan in enumerate(wanted):
            peaks, takes = predicted(plan, cost_of_layers(layers, sizes, plan.layers))
            seen = [of[number] for of in of_ranks]
            base = base or takes
            off = max(abs(p / m - 1) for p, m in zip(peaks, seen))
            again = "" if plan.layers is None else _in_words(plan.layers)
            found.append(
                [
                    model.name,
                    name,
                    plan.policy,
                    again,
                    " ".join(f"{peak / 1e6:.2f}" for peak in peaks),
                    " ".join(f"{peak / 1e6:.2f}" for peak in seen),
                    f"{off:.2%}",
                    f"{takes / base:.2f}",
                    f"{times[number] / times[0]:.2f}",
                ]
            )
            print(*found[-1], sep=" | ", file=sys.stderr)
    return found


def _in_words(layers: Layers) -> str:
    return "; ".join(" ".join(map(str, of)) or "–" for of in layers)


def main() -> None:
    """Predict, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments: Any = parser.parse_args()
    found = [row for model in MODELS.values() for row in rows(model, arguments.rounds)]
    worst = max(float(row[6].rstrip("%")) for row in found)
    titles = [
        *("model", "schedule", "policy", "layers that run again, of each stage"),
        *("MB predicted", "measured", "off", "time predicted", "measured"),
    ]
    lines = [
        "# Recomputing stages and layers: predicted and measured",
        "",
        f"{RANKS} ranks, one thread each, {MICRO_BATCHES} micro-batches, "
        f"float32, torch {torch.__version__}. Layers are profiled one by one, in one "
        "process; bytes and times of a step are what the simulator makes of them.",
        "",
        "MB are peak bytes of live activations and stored inputs, of each rank, as an "
        "ActivationMeter counts them. *fits* is what needs least time within a memory "
        f"{SHARE:.0%} of the way from what *always* takes to what *never* does, on "
        "each rank: whole stages (`fit_recompute`), and layers of them "
        "(`fit_selective`). Times are over that without recomputation: predicted, of "
        "all ops together; measured, processor time of a step in one process, on one "
        "core of a shared and busy x86-64 machine. Layers are profiled by the clock, "
        "on the same machine.",
        "",
        f"Bytes are off by {worst:.2f} % at most.",
        "",
        "| " + " | ".join(titles) + " |",
        "|-" * len(titles) + "|",
        *("| " + " | ".join(row) + " |" for row in found),
        "",
    ]
    arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
