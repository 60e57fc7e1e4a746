"""From nothing to metrics: 1F1B on 64 devices with 1,024 micro-batches.

Each round is a fresh interpreter that imports pipeproof, generates the 131,072
ops, checks, lowers and simulates them (by replay, without events), and reads the
metrics. Beside it, in the same round, the least a discrete-event simulation on SimPy
could do: one process per device that only sleeps through its own ops, with no
dependencies at all. Times are CPU seconds, user and system.

    make experiments        writes experiments/results/simulation_speed.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "simulation_speed.md"

OURS = """
import json, resource, time
begin = time.process_time()
from pipeproof.sched import catalog
from pipeproof.sim import simulate
loaded = time.process_time()
trace = simulate(catalog.make("1f1b", devices=64, micro_batches=1024))
values = trace.makespan, trace.span, trace.bubble_fraction, trace.peak_activations
end = time.process_time()
assert trace.bubble_fraction * 1087 == 63
print(json.dumps({
    "import": loaded - begin,
    "rest": end - loaded,
    "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""

BARE = """
import json, resource, time
begin = time.process_time()
import simpy
loaded = time.process_time()
environment = simpy.Environment()
def device():
    for _ in range(2048):
        yield environment.timeout(1)
for _ in range(64):
    environment.process(device())
environment.run()
end = time.process_time()
print(json.dumps({
    "import": loaded - begin,
    "rest": end - loaded,
    "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def once(code: str) -> dict[str, float]:
    """What one fresh interpreter reports."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    """Measure in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    once(OURS)  # fills the cache of compiled kernels
    rows: dict[str, list[dict[str, float]]] = {"pipeproof": [], "bare SimPy": []}
    for number in range(arguments.rounds):
        print(f"\rround {number + 1}/{arguments.rounds}", end="", file=sys.stderr)
        rows["pipeproof"].append(once(OURS))
        rows["bare SimPy"].append(once(BARE))
    print(file=sys.stderr)
    lines = [
        "# From nothing to metrics: 1F1B, P=64, M=1024 (131,072 ops)",
        "",
        f"Medians of {arguments.rounds} fresh interpreters each, in turn; CPU seconds "
        "of one core of a shared x86-64 machine. pipeproof generates, checks, lowers "
        "with messages and buffers, replays, and reads makespan, bubble and peaks; "
        "bare SimPy only sleeps through each device's ops.",
        "",
        "| | import, s | the rest, s | together, s | peak memory, MiB |",
        "|-|-|-|-|-|",
    ]
    for name, found in rows.items():
        middle = [
            statistics.median(f(r) for r in found)
            for f in (
                lambda r: r["import"],
                lambda r: r["rest"],
                lambda r: r["import"] + r["rest"],
                lambda r: r["mb"],
            )
        ]
        lines.append(
            f"| {name} | {middle[0]:.2f} | {middle[1]:.2f} | {middle[2]:.2f} | "
            f"{middle[3]:.0f} |"
        )
    arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
