"""Cutting layers into stages: how long the exact answer takes, and what it is worth.

Layers with forwards and backwards drawn at random (a fixed seed) are cut for a
schedule, with and without a memory that rules the best cuts out. Beside the best, the
same number of layers in each stage, and stages filled one after the other up to the
mean. Times are CPU seconds of `partition`, the least of three runs, or of one run that
takes over a second.

    make experiments        writes experiments/results/partitioning.md
"""

from __future__ import annotations

import random
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path

from pipeproof.sched import Layer, Partition, Schedule, catalog, partition
from pipeproof.sched.partition import loads

RESULT = Path(__file__).parent / "results" / "partitioning.md"

CASES: list[tuple[str, int, int, dict[str, int]]] = [
    ("1f1b", 8, 100, {}),
    ("1f1b", 64, 1000, {}),
    ("zb-v", 8, 96, {}),
    ("zb-v", 16, 192, {}),
    ("interleaved", 4, 48, {}),
    ("interleaved", 8, 96, {}),
    ("interleaved", 16, 192, {}),
    ("interleaved", 8, 96, {"chunks": 3}),
    ("hanayo", 8, 48, {}),
    ("chimera", 8, 96, {}),
]
"""Schedule, devices, layers, and what else it is made with."""


def drawn(count: int) -> list[Layer]:
    """Layers at random."""
    draw = random.Random(count)
    return [
        Layer(draw.random(), 2 * draw.random(), 4, 0.1 + draw.random(), 0.1, output=0.1)
        for _ in range(count)
    ]


def evenly(count: int, stages: int) -> list[int]:
    """As many in each."""
    size, longer = divmod(count, stages)
    return [size + (number < longer) for number in range(stages)]


def up_to_the_mean(layers: list[Layer], stages: int) -> list[int]:
    """Each cut where the layers so far come closest to their share."""
    so_far = list(accumulate(layer.forward + layer.backward for layer in layers))
    cuts = [0]
    for stage in range(1, stages):
        share = so_far[-1] * stage / stages
        places = range(cuts[-1] + 1, len(layers) - (stages - stage) + 1)
        cuts.append(min(places, key=lambda place: abs(so_far[place - 1] - share)))
    cuts.append(len(layers))
    return [last - first for first, last in pairwise(cuts)]


def timed(
    layers: list[Layer], schedule: Schedule, memory: float | None = None
) -> tuple[float, Partition]:
    """CPU seconds, and the answer."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 1:
        begin = time.process_time()
        found = partition(layers, schedule, memory=memory)
        times.append(time.process_time() - begin)
    return min(times), found


def main() -> None:
    """Cut, and write the table."""
    lines = [
        "# Cutting layers into stages",
        "",
        "Made by `experiments/partitioning.py`, on one core of a shared x86-64",
        "machine. `s` is CPU seconds; bottlenecks, of the busiest device, are relative",
        "to the best cuts'. In the last column each device has a twentieth less memory",
        "than these need on the fullest one. All answers are exact.",
        "",
        "| schedule | devices | stages | layers | s | evenly | up to the mean "
        "| less memory (s) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, devices, count, more in CASES:
        micro_batches = devices if name == "hanayo" else 2 * devices
        schedule = catalog.make(
            name, devices=devices, micro_batches=micro_batches, **more
        )
        layers = drawn(count)
        took, best = timed(layers, schedule)
        assert best.exact
        ratios = [
            max(loads(layers, schedule, sizes)[0]) / best.bottleneck
            for sizes in (
                evenly(count, schedule.stages),
                up_to_the_mean(layers, schedule.stages),
            )
        ]
        longer, less = timed(layers, schedule, 0.95 * max(best.bytes))
        assert less.exact
        lines.append(
            f"| {name} | {devices} | {schedule.stages} | {count:,} | {took:.2f} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} "
            f"| {less.bottleneck / best.bottleneck:.3f} ({longer:.2f}) |"
        )
        print(lines[-1], file=sys.stderr)
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
