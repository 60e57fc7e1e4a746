"""Tables 5 and 9 of Zero Bubble (arXiv:2401.10241), recomputed.

The paper measured F, I, W and the time of a transfer of its 1.5B model on 8 A100
and had its own simulator predict each schedule's bubble: 1 - M(F+I+W) / cost with
cost the longest span of any one device, here `span_bubble`. The same times go
into ours, the transfer as the latency of every link.

    make experiments        writes experiments/results/zero_bubble_tables.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeproof.sched import catalog
from pipeproof.sim import Cluster, Cost, simulate

RESULT = Path(__file__).parent / "results" / "zero_bubble_tables.md"

DEVICES = 8
MEASURED = {
    24: (18.522, 18.086, 9.337, 0.601),
    32: (18.513, 18.086, 9.331, 0.626),
    64: (18.546, 18.097, 9.321, 0.762),
}
"""Micro-batches → milliseconds of F, I, W and of a transfer (Table 9)."""
PUBLISHED = {
    "1f1b": (0.2431, 0.1985, 0.1240),
    "zb-h1": (0.1585, 0.1242, 0.0674),
    "zb-h2": (0.1083, 0.0837, 0.0444),
}
"""Bubble rates (Table 5), in the order of `MEASURED`."""


def main() -> None:
    """Predict and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    lines = [
        "# Bubble rates of Zero Bubble's 1.5B model on 8 devices",
        "",
        "`span_bubble` as predicted, and as published. `makespan` is the whole step in",
        "milliseconds.",
        "",
        "| schedule | M | predicted | published | makespan |",
        "|-|-|-|-|-|",
    ]
    for name, published in PUBLISHED.items():
        for (m, (f, i, w, transfer)), there in zip(MEASURED.items(), published):
            schedule = catalog.make(name, devices=DEVICES, micro_batches=m)
            trace = simulate(schedule, Cost(f, i, w), Cluster(transfer))
            lines.append(
                f"| {name} | {m} | {trace.span_bubble:.4f} | {there:.4f} | "
                f"{trace.makespan:.1f} |"
            )
    text = "\n".join([*lines, ""])
    arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
