"""Full against selective recomputation, for the models of 2205.05198, table 3.

Korthikanti et al. 2022 measure iteration times of four models with full
recomputation, and with selective recomputation and sequence parallelism (table 5).
Here both are predicted from the models' shapes and the paper's configurations.

One assumption, for all rows: an op takes as long as its matrix products have FLOPs,
whatever they are, at one rate. The rate cancels in the ratio. Layer norms, dropouts,
softmax, the optimizer and all communication take no time.

As in Megatron-LM, a backward recomputes its layers itself, once its gradient is
there. Beside it, what an R of its own would take that need not wait for it.

    make experiments        writes experiments/results/recomputation.md
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeproof.sched import Schedule, catalog, recompute
from pipeproof.sched.exact import Number
from pipeproof.sim import MODELS, Cost, simulate

RESULT = Path(__file__).parent / "results" / "recomputation.md"

PEAK = 312e12
"""FLOP/s of the paper's A100 in 16 bits."""


class Row(NamedTuple):
    """A model of table 3 and its times in table 5, in seconds."""

    model: str
    schedule: Schedule
    full_s: float
    selective_s: float


def rows() -> list[Row]:
    """The paper's configurations; 175B and 530B interleave three stages a device."""

    def interleaved(p: int, m: int) -> Schedule:
        return catalog.make("interleaved", devices=p, micro_batches=m, chunks=3)

    def one_f_one_b(p: int, m: int) -> Schedule:
        return catalog.make("1f1b", devices=p, micro_batches=m)

    return [
        Row("gpt-22b", one_f_one_b(1, 1), 1.42, 1.10),
        Row("gpt-175b", interleaved(8, 64), 18.13, 13.75),
        Row("gpt-530b", interleaved(35, 280), 49.05, 37.83),
        Row("gpt-1t", one_f_one_b(64, 512), 94.42, 71.49),
    ]


class Prediction(NamedTuple):
    """Times in FLOPs of a device."""

    full: Number
    beside: Number
    selective: Number


def predict(row: Row) -> Prediction:
    """Both ways of recomputing, and R as ops of their own."""
    model = MODELS[row.model]
    selective = replace(model, recompute="selective", sequence_parallel=True)
    with_r = recompute(row.schedule, "always")
    full = replace(model, recompute="full").cost(with_r)
    assert isinstance(full.recompute, tuple)
    parts = zip(full.input_grad, full.weight_grad, full.recompute)
    inside = Cost(forward=full.forward, backward=[sum(part) for part in parts])
    return Prediction(
        simulate(row.schedule, inside).makespan,
        simulate(with_r, full).makespan,
        simulate(row.schedule, selective.cost(row.schedule)).makespan,
    )


HEAD = """\
# Full against selective recomputation (Korthikanti et al. 2022, table 5)

Iteration time with full recomputation, over that with selective recomputation and
sequence parallelism. Predicted from shapes alone: every op takes as long as its
matrix products have FLOPs, at one rate, which cancels; the rest is free.

| model | schedule | seconds | ratio | predicted | off | R apart | full | selective |
|-|-|-|-|-|-|-|-|-|
"""
FOOT = """
*R apart*: the predicted ratio if recomputations were ops of their own, which start
before their gradient arrives; then part of them fills the bubble. *full*,
*selective*: the part of 312 TFLOP/s at which the predicted FLOPs and the bubble
take the measured time. Where the two differ, the prediction is off by their
ratio.
"""


def report() -> str:
    """The table."""
    lines = []
    for row in rows():
        found = predict(row)
        measured = row.full_s / row.selective_s
        predicted = float(found.full / found.selective)
        rates = (
            float(flops) / seconds / PEAK
            for flops, seconds in (
                (found.full, row.full_s),
                (found.selective, row.selective_s),
            )
        )
        lines.append(
            f"| {row.model} | {row.schedule.summary} | {row.full_s:.2f} → "
            f"{row.selective_s:.2f} | {measured:.3f} | {predicted:.3f} | "
            f"{predicted / measured - 1:+.1%} | "
            f"{float(found.beside / found.selective):.3f} | "
            + " | ".join(f"{rate:.1%}" for rate in rates)
            + " |"
        )
    return HEAD + "\n".join(lines) + "\n" + FOOT


def main() -> None:
    """Predict, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    text = report()
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
