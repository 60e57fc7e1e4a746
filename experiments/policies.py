"""What the placing of sends and receives costs: 1F1B under every policy of lowering.

Equal stages, forward, input and weight gradient of one tick each, and a message that
occupies its link for a part of it; sends wait until their receives are posted. The
schedule, its ops and its costs are the same in every row: what differs is only how
its messages are posted, and which streams a communication library has for them.

    make experiments        writes experiments/results/policies.md
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from pipeproof.sched import catalog, lower
from pipeproof.sched.lower import POLICIES
from pipeproof.sched.streams import STREAM_MODELS, StreamModel
from pipeproof.sim import Cluster, Cost, simulate

RESULT = Path(__file__).parent / "results" / "policies.md"

DEVICES, MICRO_BATCHES = 8, 32
LINK = Fraction(1, 5)
"""Time that a message takes, in ticks."""


def bubble(policies: dict[str, Any], streams: StreamModel) -> float:
    """The bubble fraction of 1F1B."""
    schedule = catalog.make("1f1b", devices=DEVICES, micro_batches=MICRO_BATCHES)
    trace = simulate(
        lower(schedule, **policies),
        Cost(boundary_bytes=LINK),
        Cluster(link_bandwidth=1, buffering="rendezvous", streams=streams),
    )
    return float(trace.bubble_fraction)


def main() -> None:
    """Predict and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    free = Fraction(DEVICES - 1, MICRO_BATCHES + DEVICES - 1)
    lines = [
        f"# Bubble fraction of 1F1B, {DEVICES} devices, {MICRO_BATCHES} micro-batches",
        "",
        f"F = I = W = 1; a message takes {float(LINK)}; rendezvous. With free links it",
        f"is {float(free):.4f}. Columns are stream models: one for each direction of a",
        "link, one for each pair of devices, one for all messages of a device, and one",
        "for everything that it does.",
        "",
        "| " + " | ".join([*POLICIES, *STREAM_MODELS]) + " |",
        "|-" * (len(POLICIES) + len(STREAM_MODELS)) + "|",
    ]
    for values in product(*POLICIES.values()):
        policies = dict(zip(POLICIES, values))
        found = [f"{bubble(policies, streams):.4f}" for streams in STREAM_MODELS]
        lines.append("| " + " | ".join([*values, *found]) + " |")
    text = "\n".join([*lines, ""])
    arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
