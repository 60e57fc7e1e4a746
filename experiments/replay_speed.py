"""How fast programs are replayed, alone, in batches, and from schedule to metrics.

Times are CPU seconds of one core, user and system, so that others who share the
machine do not count. Each figure is the median of rounds in fresh interpreters,
which find the compiled kernels in their cache.

    make experiments        writes experiments/results/replay_speed.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "replay_speed.md"

TIMED = """
import json, resource, sys
from time import process_time
def best(call, rounds=7):
    times = []
    for _ in range(rounds):
        begin = process_time(); call(); times.append(process_time() - begin)
    return min(times)
def report(**numbers):
    numbers["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(numbers))
"""

PASS = """
from pipeproof.sched import catalog, kernels, lower
from pipeproof.sim import Cluster, Cost
from pipeproof.sim.replay import replay
from pipeproof.sim.timing import Timing
kernels.COMPILE_FROM = 0
program = lower(catalog.make("1f1b", devices=128, micro_batches=4096))
cluster = Cluster(link_latency=1)
cost = Cost(*map({number}, (2, 3, 4)))
timing = Timing.of(program, cost, cluster, cost.sizes(program))
seen = []
run = kernels.run
def spy(kernel, columns, **options):
    seen.append((kernel, columns))
    return run(kernel, columns, **options)
kernels.run = spy
replay(program, timing, cluster)
kernels.run = run
kernel, columns = seen[0]
compiled = kernels.compiled(kernel, len(program))
def alone():
    columns[8][:] = 0  # when each stream is free
    compiled(*columns)
report(ops=len(program.schedule), instructions=len(program), alone=best(alone),
       whole=best(lambda: replay(program, timing, cluster)))
"""

BOTH = """
from pipeproof.sched import catalog, lower
from pipeproof.sim import Cluster, simulate
program = lower(catalog.make("1f1b", devices=64, micro_batches=1024))
cluster = Cluster(link_latency=1)
seconds, ends = {}, []
for engine in ("events", "replay"):
    begin = process_time()
    ends.append(simulate(program, None, cluster, engine=engine).end)
    seconds[engine] = process_time() - begin
assert (ends[0] == ends[1]).all()
report(ops=len(program.schedule), instructions=len(program), **seconds)
"""

MANY = """
import numpy as np
from pipeproof.sched import catalog, lower
from pipeproof.sim import Cluster, Cost, simulate_many
program = lower(catalog.make("1f1b", devices=8, micro_batches=32))
cost, cluster = Cost(1.0, 1.0, 1.0), Cluster(link_latency=0.1)
usual = np.array(cost.durations(program))
noise = np.random.default_rng(0).normal(1, 0.1, (10_000, len(usual))).clip(0)
report(ops=len(program.schedule), evaluations=len(noise),
       seconds=best(lambda: simulate_many(program, usual * noise, cost, cluster), 3))
"""

WHOLE = """
from pipeproof.sched import catalog, lower
from pipeproof.sim import simulate
marks = [process_time()]
def mark(): marks.append(process_time())
p, m = {devices}, {micro_batches}
schedule = catalog.make("1f1b", devices=p, micro_batches=m); mark()
schedule.report; mark()
program = lower(schedule); mark()
trace = simulate(program); mark()
trace.makespan, trace.bubble_fraction; mark()
trace.peak_activations; mark()
assert trace.bubble_fraction * (m + p - 1) == p - 1
assert trace.peak_activations == [min(p - d, m) for d in range(p)]
names = "make", "check", "lower", "simulate", "bubble", "peaks"
spent = dict(zip(names, (b - a for a, b in zip(marks, marks[1:]))))
report(ops=len(schedule), instructions=len(program), **spent)
"""

AGAIN = """
from pipeproof.sched import catalog, lower
from pipeproof.sim import simulate
schedule = None
def from_schedule():
    trace = simulate(lower(schedule))
    return trace.makespan, trace.bubble_fraction, trace.peak_activations
spent = []
for _ in range(8):
    schedule = catalog.make("{name}", devices={devices}, micro_batches={micro_batches})
    begin = process_time(); from_schedule(); spent.append(process_time() - begin)
report(ops=len(schedule), seconds=min(spent[1:]))
"""

SHARED = """
from pipeproof.sched import catalog, lower
from pipeproof.sim import Cluster, Cost, simulate
schedule = catalog.make("{name}", devices={devices}, micro_batches={micro_batches})
program = lower(schedule)
cost = Cost(18.522, 18.086, 9.337, boundary_bytes=8, activation_bytes=20)
cluster = Cluster(
    link_latency=0.5, link_bandwidth=4, devices_per_node=2, nic_bandwidth=1)
report(ops=len(schedule),
       seconds=best(lambda: simulate(program, cost, cluster, engine="events"), 3))
"""

START = """
begin = process_time()
from pipeproof.sched import catalog
from pipeproof.sim import simulate
simulate(catalog.make("1f1b", devices=8, micro_batches=32)).peak_activations
assert not {"numba", "torch"} & set(sys.modules)
report(seconds=process_time() - begin)
"""


def medians(code: str, rounds: int) -> dict[str, float]:
    """What fresh interpreters report, each figure's median."""
    found: list[dict[str, float]] = []
    for number in range(rounds + 1):
        done = subprocess.run(
            [sys.executable, "-c", TIMED + code],
            check=True,
            capture_output=True,
            text=True,
        )
        if number or not rounds:  # the first fills the cache
            found.append(json.loads(done.stdout))
    return {name: statistics.median(f[name] for f in found) for name in found[0]}


def passes(rounds: int) -> list[str]:
    """The pass alone, and with what stands around it."""
    lines = [
        "## One pass over 1F1B, P=128, M=4096",
        "",
        "`pass`: the compiled loop, its columns ready. `replay`: with the check for "
        "contention and new columns for the times. Millions a second, of "
        "instructions (which is what the loop is over) and of the compute ops among "
        "them.",
        "",
        "| | pass, s | instructions | compute ops | replay, s | instructions | "
        "compute ops |",
        "|-|-|-|-|-|-|-|",
    ]
    for number, name in (("int", "int32"), ("float", "float64")):
        found = medians(PASS.replace("{number}", number), rounds)
        cells: list[Any] = [name]
        for key in ("alone", "whole"):
            cells.append(f"{found[key]:.4f}")
            cells += [f"{found[n] / found[key] / 1e6:.0f}" for n in COUNTED]
        lines.append(row(cells))
    return lines


COUNTED = ("instructions", "ops")


def engines(rounds: int) -> list[str]:
    """The same program by both engines."""
    found = medians(BOTH, rounds)
    return [
        "## Both engines on 1F1B, P=64, M=1024, links with latency",
        "",
        "Replay with its kernel, loaded from its cache, in the figure.",
        "",
        "| engine | s | compute ops a second |",
        "|-|-|-|",
        *(
            row([name, f"{found[name]:.2f}", f"{found['ops'] / found[name]:,.0f}"])
            for name in ("events", "replay")
        ),
    ]


def batches(rounds: int) -> list[str]:
    """Many evaluations of one program."""
    found = medians(MANY, rounds)
    rate = found["ops"] * found["evaluations"] / found["seconds"] / 1e6
    return [
        "## 10,000 evaluations with jitter: 1F1B, P=8, M=32",
        "",
        f"{found['seconds']:.2f} s, {rate:.0f} million compute ops a second.",
    ]


def wholes(rounds: int, sizes: list[tuple[int, int]]) -> list[str]:
    """From schedule to metrics, step by step."""
    names = ("make", "check", "lower", "simulate", "bubble", "peaks")
    lines = [
        "## From nothing to makespan, bubble and peak activations: 1F1B",
        "",
        "Seconds in each step of a fresh process; numba's import is in `check` where "
        "the size makes it worth loading.",
        "",
        row(["P, M", "compute ops", *names, "together", "ops a second", "MiB"]),
        row(["-"] * (len(names) + 5)).replace(" ", ""),
    ]
    for devices, micro_batches in sizes:
        code = WHOLE.replace("{devices}", str(devices))
        code = code.replace("{micro_batches}", str(micro_batches))
        found = medians(code, rounds if devices < 1024 else 0)
        together = sum(found[name] for name in names)
        cells = [f"{devices}, {micro_batches}", f"{found['ops']:,.0f}"]
        cells += [f"{found[name]:.2f}" for name in (*names,)]
        cells += [f"{together:.2f}", f"{found['ops'] / together:,.0f}"]
        lines.append(row([*cells, f"{found['mb']:,.0f}"]))
    return lines


SCHEDULES = (
    ("1f1b", 8, 128),
    ("1f1b", 64, 1024),
    ("1f1b", 128, 4096),
    ("interleaved", 128, 1024),
    ("zb-h1", 64, 1024),
    ("zb-v", 64, 1024),
    ("seq1f1b", 64, 512),
    ("hanayo", 64, 512),
    # With two pipes, overlap groups or copies.
    ("dualpipe-v", 64, 512),
    ("dualpipe", 64, 1024),
    ("chimera", 64, 1024),
    ("bpipe", 64, 1024),
    ("pipeoffload", 64, 512),
)
"""Names, devices and micro-batches."""


def again(rounds: int) -> list[str]:
    """From a schedule to metrics, in a process that has done it before."""
    lines = [
        "## From a schedule to makespan, bubble and peaks, kernels loaded",
        "",
        "Check, lower, simulate, metrics; the best of seven in each process.",
        "",
        "| schedule | P, M | compute ops | s | ops a second |",
        "|-|-|-|-|-|",
    ]
    for name, p, m in SCHEDULES:
        found = medians(sized(AGAIN, name, p, m), rounds)
        rate = f"{found['ops'] / found['seconds']:,.0f}"
        ops = f"{found['ops']:,.0f}"
        lines.append(row([name, f"{p}, {m}", ops, f"{found['seconds']:.4f}", rate]))
    return lines


def shared(rounds: int) -> list[str]:
    """The engine where transfers share network cards."""
    lines = [
        "## Transfers that share network cards, which the events engine alone plays",
        "",
        "Two devices a node and one card for both, messages that overlap.",
        "",
        "| schedule | P, M | compute ops | s | ops a second |",
        "|-|-|-|-|-|",
    ]
    for name, p, m in (("1f1b", 64, 256), ("interleaved", 16, 128), ("zb-v", 16, 256)):
        found = medians(sized(SHARED, name, p, m), rounds)
        rate = f"{found['ops'] / found['seconds']:,.0f}"
        ops = f"{found['ops']:,.0f}"
        lines.append(row([name, f"{p}, {m}", ops, f"{found['seconds']:.2f}", rate]))
    return lines


def sized(code: str, name: str, devices: int, micro_batches: int) -> str:
    """A script for one schedule."""
    code = code.replace("{name}", name).replace("{devices}", str(devices))
    return code.replace("{micro_batches}", str(micro_batches))


def starting(rounds: int) -> list[str]:
    """Import and a small simulation."""
    found = medians(START, rounds)
    return [
        "## Start",
        "",
        f"Import, 1F1B with P=8, M=32, its metrics: {found['seconds']:.2f} s, without "
        "torch and without numba.",
    ]


def row(cells: list[Any]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--large", action="store_true", help="also ten million ops (4 GiB)"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    sizes = [(8, 32), (64, 1024), (128, 4096), *[(1024, 5000)] * arguments.large]
    parts: list[Callable[[], list[str]]] = [
        lambda: passes(arguments.rounds),
        lambda: engines(arguments.rounds),
        lambda: batches(arguments.rounds),
        lambda: shared(arguments.rounds),
        lambda: again(arguments.rounds),
        lambda: wholes(arguments.rounds, sizes),
        lambda: starting(arguments.rounds),
    ]
    lines = [
        "# Replay",
        "",
        f"Medians of {arguments.rounds} fresh interpreters, CPU seconds of one core "
        "of a shared x86-64 machine; ten million ops once.",
    ]
    for number, part in enumerate(parts):
        print(f"\rpart {number + 1}/{len(parts)}", end="", file=sys.stderr)
        lines += ["", *part()]
    print(file=sys.stderr)
    arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
