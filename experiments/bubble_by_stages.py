"""Which bubble at how many stages, every schedule within the same memory.

A batch of 128 micro-batches, and P devices from 2 to 1,024 with equal shares of a
model of 1,024 layers, F = I = W, free links, no recomputation.

*Equal memory.* The unit is A, the activations of one micro-batch on one device's
share. 1F1B holds P of them: of a fixed model that is the same number of bytes at
every P, one micro-batch through the whole model. A budget is a multiple of it and
one micro-batch more, since several papers state their peaks so: P/2 + 1, P + 1
and 2P + 1. No device may hold more at any time. What does not fit with the whole
batch in flight takes it in rounds, each drained before the next: 128 / m rounds
of m, with the largest m that fits, m = 128, 64, …, 1. Of 2, 4 or 8 chunks the
number with the smallest bubble counts, with a layer a stage at least; slices are 4.

The bubble is the fraction of device-time that is idle, fill and drain of every
round included. Weights are not in the budget: the schedules marked * hold two
replicas. Generators that place op by op are too slow for the largest P, and are
left out there (see LARGEST).

    make experiments        writes experiments/results/bubble_by_stages.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeproof.sched import CATALOG
from pipeproof.sim import Cost, grid, sweep
from pipeproof.sim.sweep import Figures, Point, Result

RESULT = Path(__file__).parent / "results" / "bubble_by_stages.md"

BATCH = 128
LAYERS = 1024
DEVICES = [2**k for k in range(1, 11)]
LARGEST = {"v-half": 64, "v-min": 64, "hanayo": 128}
TWO_REPLICAS = {"gems", "chimera", "dualpipe"}

BUDGETS: dict[str, Callable[[int], int]] = {
    "P/2 + 1": lambda p: p // 2 + 1,
    "P + 1": lambda p: p + 1,
    "2P + 1": lambda p: 2 * p + 1,
}

# Divisible by all chunks and slices, so that times stay whole numbers.
COST = Cost(forward=8, input_grad=8, weight_grad=8)

Cell = tuple[str, int]
"""Schedule and P."""


def points_of(micro_batches: int) -> list[Point]:
    """Every schedule and option at every P, with so many micro-batches a round."""
    points = grid(
        CATALOG,
        DEVICES,
        [micro_batches],
        costs={"F=I=W": COST},
        chunks=[2, 4, 8],
        slices=[4],
    )
    return [point for point in points if is_wanted(point)]


def is_wanted(point: Point) -> bool:
    """Whether the model has enough layers for it, and its generator is quick."""
    if point.devices * point.options.get("chunks", 1) > LAYERS:
        return False
    return point.devices <= LARGEST.get(point.name, point.devices)


def variant(point: Point) -> tuple[str, int, str]:
    """What is asked for one m after the other."""
    return point.name, point.devices, str(point.described()["options"])


def fits(result: Result, budget: str) -> bool:
    """Whether no device exceeds the budget."""
    most = BUDGETS[budget](result.point.devices)
    return result.figures is not None and max(result.figures.peak_activations) <= most


def largest_rounds(file: Path, jobs: int) -> dict[str, list[Result]]:
    """For each budget, every variant with the largest m that fits."""
    settled: dict[str, dict[tuple[str, int, str], Result]] = {b: {} for b in BUDGETS}
    asked: list[Point] = []
    for m in (BATCH >> k for k in range(BATCH.bit_length())):
        open_ = [
            point
            for point in points_of(m)
            if any(variant(point) not in found for found in settled.values())
        ]
        # One file for all: a larger sweep starts from a smaller.
        asked += open_
        results = sweep(asked, file=file, jobs=jobs, progress=told(m))
        for result in results[len(asked) - len(open_) :]:
            for budget, found in settled.items():
                if variant(result.point) not in found and fits(result, budget):
                    found[variant(result.point)] = result
    return {budget: list(found.values()) for budget, found in settled.items()}


def told(micro_batches: int) -> Callable[[int, int], None]:
    """What tells how far it is."""

    def tell(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        text = f"\rrounds of {micro_batches}: {done}/{total} points"
        print(text, end=end, file=sys.stderr, flush=True)

    return tell


def best(results: Iterable[Result]) -> dict[Cell, tuple[Figures, Point]]:
    """The option with the smallest bubble, of each schedule at each P."""
    found: dict[Cell, tuple[Figures, Point]] = {}
    for result in results:
        assert result.figures is not None
        cell = (result.point.name, result.point.devices)
        if (
            cell not in found
            or result.figures.bubble_fraction < found[cell][0].bubble_fraction
        ):
            found[cell] = (result.figures, result.point)
    return found


def shown(cell: Cell, found: dict[Cell, tuple[Figures, Point]]) -> str:
    """The bubble in percent, and what it took."""
    name, p = cell
    if p > LARGEST.get(name, p):
        return "·"
    if cell not in found:
        return "–"
    figures, point = found[cell]
    words = [f"{figures.bubble_fraction:.1%}"]
    words += [f"{key[0]}={value}" for key, value in point.options.items()]
    words += [f"m={point.micro_batches}"] if point.micro_batches < BATCH else []
    return " ".join(words)


def table(budget: str, results: Iterable[Result]) -> list[str]:
    """One budget, a row a schedule, a column a P."""
    found = best(results)
    lines = [
        f"## Budget {budget}",
        "",
        "| P | " + " | ".join(map(str, DEVICES)) + " |",
        "|-" * (len(DEVICES) + 1) + "|",
    ]
    for name in CATALOG:
        mark = "*" if name in TWO_REPLICAS else ""
        cells = (shown((name, p), found) for p in DEVICES)
        lines.append(f"| {name}{mark} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    """Sweep and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--keep", type=Path, help="a .csv or .parquet to go on from")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.keep or Path(folder) / "points.csv"
        found = largest_rounds(file, arguments.jobs)
    lines = [
        f"# Bubble by number of devices, {BATCH} micro-batches, equal memory",
        "",
        "Idle device-time in percent; F = I = W, free links, no recomputation. A "
        "budget is the most micro-batches' activations of its share that a device "
        "may hold at once; 1F1B's first device holds P. `m=` is the size of the "
        f"rounds that the batch is taken in, {BATCH} where there is none; `c=` "
        f"chunks, the best of 2, 4 and 8 within {LAYERS:,} layers; `s=` slices. "
        "*: two replicas of the weights. –: not within the budget, the layers or "
        "what the schedule allows, at any m. ·: left out, its generator is slow. The "
        "exact terms are in experiments/bubble_by_stages.py.",
        "",
    ]
    for budget, results in found.items():
        lines += table(budget, results)
    arguments.output.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
