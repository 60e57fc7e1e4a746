"""What a profile predicts of a step, against a fresh run: two ranks.

For each placement of stages on two ranks, variants of one schedule are traced and
make a cost (as `pipeproof profile` does). With it each schedule of that placement is
simulated, and run. Traced and fresh steps take turns in the same processes, so that
all see the same machine; bytes are those of the first micro-batch.

    python experiments/executor/prediction.py
        writes experiments/results/prediction.md
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeproof.cli.profiling import bytes_of, peaks_of, predicted
from pipeproof.exec import ActivationMeter, Pipeline, Ranks, launch, profile
from pipeproof.exec.examples import Block
from pipeproof.exec.variants import variants
from pipeproof.sched import Schedule, catalog, recompute
from pipeproof.sim import Measured, cost_of, links_of

RESULT = Path(__file__).parent.parent / "results" / "prediction.md"
RANKS, MICRO_BATCHES, WARM_UP = 2, 8, 3
BLOCKS, WIDTH, HEADS, ROWS, POSITIONS = 8, 128, 4, 2, 64

GROUPS: dict[str, list[tuple[str, str]]] = {
    "one stage a rank": [
        ("1f1b", "never"),
        ("naive", "never"),
        ("gpipe", "never"),
        ("gpipe", "except-last"),
        ("1f1b", "always"),
        ("eager-1f1b", "never"),
        ("zb-h1", "never"),
        ("zb-h2", "never"),
    ],
    "two stages a rank, looped": [
        ("interleaved", "never"),
        ("looped-bfs", "never"),
    ],
    "two stages a rank, V": [
        ("zb-v", "never"),
        ("v-half", "never"),
        ("v-min", "never"),
        ("dualpipe-v", "never"),
        ("hanayo", "never"),
    ],
}
"""Schedules and policies of recomputation; the first one's stages are profiled."""


def made(name: str, policy: str) -> Schedule:
    """One of them."""
    schedule = catalog.make(name, devices=RANKS, micro_batches=MICRO_BATCHES)
    return recompute(schedule, policy)  # type: ignore[arg-type]


Row = tuple[str, float, float, float, list[int], list[int]]
"""Schedule, seconds predicted and measured, cost of tracing, bytes likewise."""


def measured(ranks: Ranks, group: str, rounds: int) -> list[Row]:
    """On each rank: every schedule of a group, predicted and measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedules = [made(*which) for which in GROUPS[group]]
    per_stage = BLOCKS // schedules[0].stages
    stages: list[nn.Module] = [
        nn.Sequential(*(Block(WIDTH, HEADS, dropout=0.0) for _ in range(per_stage)))
        for _ in range(schedules[0].stages)
    ]
    x = torch.randn(ROWS * MICRO_BATCHES, POSITIONS, WIDTH)

    def pipeline(schedule: Schedule) -> Pipeline:
        return Pipeline(stages, schedule, functional.mse_loss, ranks=ranks)

    first = profile(
        stages, schedules[0], functional.mse_loss, x, x, ranks=ranks, rounds=1
    )
    bytes_ = bytes_of(first.stages)
    probes = [pipeline(variant) for variant in variants(schedules[0]).values()]
    fresh = [pipeline(schedule) for schedule in schedules]
    traces, outside = [], []
    plain: list[list[float]] = [[] for _ in fresh]
    traced: list[list[float]] = [[] for _ in fresh]
    for round_ in range(-WARM_UP, rounds):
        for probe in probes:
            took = timed(probe, x)
            probe.step(x, x, record=True)
            if round_ >= 0:
                traces.append(probe.trace)
                outside.append(took - probe.instructions_s)
        for number, one in enumerate(fresh):
            for times, record in (plain, False), (traced, True):
                took = timed(one, x, record=record)
                if round_ >= 0:
                    times[number].append(took)
    peaks = [peak_of(one, stages, x) for one in fresh]
    said = ranks.exchange([plain, traced, peaks, median(outside)], "the others'")
    cost = replace(cost_of(traces), **bytes_)
    found = Measured(
        cost,
        links_of(traces, first.link_rates, cost),
        max(of_rank[3] for of_rank in said),
    )
    rows = []
    for number, (one, schedule) in enumerate(zip(fresh, schedules)):
        trace = predicted(one.program, found, shared=False)
        policy = GROUPS[group][number][1]
        name = schedule.name + ("" if policy == "never" else f", {policy}")
        seconds, watched = (
            median(max(of) for of in zip(*(of_rank[kind][number] for of_rank in said)))
            for kind in (0, 1)
        )
        rows.append(
            (
                name,
                float(trace.makespan) + found.step_outside,
                seconds,
                watched / seconds,
                peaks_of(trace, shared=False),
                [of_rank[2][number] for of_rank in said],
            )
        )
    return rows


def timed(one: Pipeline, x: Tensor, **options: Any) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    one.step(x, x, **options)
    return time.perf_counter() - began


def peak_of(one: Pipeline, stages: list[nn.Module], x: Tensor) -> int:
    """Bytes of live activations at their most, on this rank."""
    with ActivationMeter(stages) as meter:
        meter.ignore(x)
        one.step(x, x)
    return meter.peak


def main() -> None:
    """Measure all groups and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    for group in GROUPS:
        print(group, file=sys.stderr)
        rows += launch(measured, RANKS, group, arguments.rounds)[0]
    off = [abs(p / m - 1) for _, p, m, *_ in rows]
    bytes_off = [abs(p / m - 1) for *_, ps, ms in rows for p, m in zip(ps, ms)]
    text = [
        "# A profile's prediction against a fresh run",
        "",
        f"{RANKS} ranks on one shared x86-64 machine of {os.cpu_count()} "
        f"cores (load average at the start: {load:.1f}), one thread each, "
        f"{MICRO_BATCHES} micro-batches of {ROWS} × {POSITIONS} positions, "
        f"{BLOCKS} transformer blocks of width {WIDTH}, torch {torch.__version__}, "
        "float32.",
        f"Medians over {arguments.rounds} rounds, in which traced and fresh steps take "
        "turns. A step is as long as its slower rank's. Peak bytes of live "
        "activations, of each rank, as an ActivationMeter counts them.",
        "",
        f"Step time is off by {median(off):.1%} in the median over schedules, at most "
        f"{max(off):.1%}; peak bytes by {median(bytes_off):.2%}, at most "
        f"{max(bytes_off):.2%}. A traced step takes "
        f"{median(cost for _, _, _, cost, *_ in rows):.3f} times an untraced one in "
        "the median.",
        "",
        "| schedule | step, ms: predicted | measured | off | traced / untraced | peak "
        "kB: predicted | measured |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, p, m, cost, peaks, counted in rows:
        kb = [
            " ".join(f"{b / 1e3:,.0f}" for b in several) for several in (peaks, counted)
        ]
        text.append(
            f"| {name} | {p * 1e3:.1f} | {m * 1e3:.1f} | {p / m - 1:+.1%} | {cost:.3f} "
            f"| {kb[0]} | {kb[1]} |"
        )
    arguments.output.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
