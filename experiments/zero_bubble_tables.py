"""Tables 5 and 9 of Zero Bubble (arXiv:2401.10241), recomputed.

The paper measured F, I, W and the time of a transfer of its models on A100 and had
its own simulator predict each schedule's bubble: 1 - M(F+I+W) / cost with cost the
longest span of any one device, here `span_bubble`. The same times go into ours, the
transfer as the latency of every link.

    make experiments        writes experiments/results/zero_bubble_tables.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from pipeproof.sched import catalog
from pipeproof.sim import Cluster, Cost, simulate

RESULT = Path(__file__).parent / "results" / "zero_bubble_tables.md"


class Published(NamedTuple):
    """A model of so many parameters on P devices with M micro-batches.

    Attributes:
        model: its size.
        p, m: devices, and micro-batches.
        times: milliseconds of F, I and W (table 9).
        transfer: likewise.
        bubbles: of 1F1B, ZB-H1 and ZB-H2 (table 5).
    """

    model: str
    p: int
    m: int
    times: tuple[float, float, float]
    transfer: float
    bubbles: tuple[float, float, float]


NAMES = ("1f1b", "zb-h1", "zb-h2")
PUBLISHED = tuple(
    Published(*row)
    for row in (
        ("1.5B", 8, 24, (18.522, 18.086, 9.337), 0.601, (0.2431, 0.1585, 0.1083)),
        ("1.5B", 8, 32, (18.513, 18.086, 9.331), 0.626, (0.1985, 0.1242, 0.0837)),
        ("1.5B", 8, 64, (18.546, 18.097, 9.321), 0.762, (0.1240, 0.0674, 0.0444)),
        ("6.2B", 8, 24, (29.718, 29.444, 19.927), 0.527, (0.2347, 0.1323, 0.0698)),
        ("6.2B", 8, 32, (29.802, 29.428, 19.530), 0.577, (0.1898, 0.1045, 0.0559)),
        ("6.2B", 8, 64, (29.935, 29.621, 19.388), 0.535, (0.1091, 0.0554, 0.0294)),
        ("14.6B", 16, 48, (11.347, 11.248, 8.132), 0.377, (0.2552, 0.1397, 0.0672)),
        ("14.6B", 16, 64, (11.307, 11.254, 8.101), 0.379, (0.2082, 0.1088, 0.0516)),
        ("14.6B", 16, 128, (11.325, 11.308, 8.109), 0.378, (0.1251, 0.0576, 0.0266)),
        ("28.3B", 32, 96, (10.419, 10.207, 7.715), 0.408, (0.2646, 0.1421, 0.0641)),
        ("28.3B", 32, 128, (10.408, 10.204, 7.703), 0.408, (0.2168, 0.1106, 0.0490)),
        ("28.3B", 32, 256, (10.402, 10.248, 7.698), 0.460, (0.1352, 0.0594, 0.0257)),
    )
)


def main() -> None:
    """Predict and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    lines = [
        "# Bubble rates of Zero Bubble's models",
        "",
        "`span_bubble` as predicted and as published, P devices, M micro-batches.",
        "`makespan` is the whole step in milliseconds.",
        "",
        "| model | P | M | schedule | predicted | published | makespan |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in PUBLISHED:
        for name, there in zip(NAMES, row.bubbles):
            schedule = catalog.make(name, devices=row.p, micro_batches=row.m)
            trace = simulate(schedule, Cost(*row.times), Cluster(row.transfer))
            lines.append(
                f"| {row.model} | {row.p} | {row.m} | {name} | "
                f"{trace.span_bubble:.4f} | {there:.4f} | {trace.makespan:.1f} |"
            )
    text = "\n".join([*lines, ""])
    arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
