"""Lowering and timing, beside torch's own and beside a plain Python loop.

In turn, in one process, from one schedule:

* *lower*: `pipeproof.sched.lower`, which gives messages, streams, buffers and
  waits, against `_add_send_recv` of torch.distributed.pipelining, which inserts
  sends and receives into the same compute actions (read from our CSV);
* *time*: `pipeproof.sim.simulate` of the lowered program, against torch's
  `_simulate_comms_compute`, which finds a timetable in unit steps, and against
  the least that gives the same makespan: a loop over the ops in a good order that
  adds a duration to the latest of two or three ends, without messages, buffers or
  a trace. It is given its order for nothing.

    make experiments        writes experiments/results/lowering_speed.md
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.distributed.pipelining.schedules as theirs

from pipeproof.sched import Kind, Schedule, catalog, lower
from pipeproof.sched.ir import BACKWARD_KINDS
from pipeproof.sim import simulate

RESULT = Path(__file__).parent / "results" / "lowering_speed.md"

NAMES = "1f1b", "interleaved", "zb-v"
SIZES = (8, 64), (64, 512)


def actions_of(schedule: Schedule) -> dict[int, list[Any]]:
    """A schedule's rows as torch's actions."""
    letters = {Kind.F: "F", Kind.B: "B", Kind.I: "I", Kind.W: "W"}
    return {
        device: [
            theirs._Action.from_str(f"{op.stage}{letters[op.kind]}{op.micro_batch}")
            for op in schedule.row(device)
        ]
        for device in range(schedule.devices)
    }


def ordered(schedule: Schedule) -> list[tuple[int, tuple[Any, ...]]]:
    """Each op as (device, key), in an order in which all it needs comes first."""
    trace = simulate(schedule)
    program = trace.program
    when = sorted(program.computes.tolist(), key=lambda i: (trace.start[i], i))
    result = []
    for index in when:
        op = schedule.ops[int(program.first_op[index])]
        result.append((int(program.device[index]), (op.kind, op.stage, op.micro_batch)))
    return result


def plain_loop(ops: list[tuple[int, tuple[Any, ...]]], stages: int) -> int:
    """The makespan with one tick an F, I and W of a stage."""
    free: dict[int, int] = defaultdict(int)
    end: dict[tuple[Any, ...], int] = {}
    for device, (kind, stage, number) in ops:
        ready = free[device]
        if kind == Kind.F:
            if stage:
                ready = max(ready, end[Kind.F, stage - 1, number])
        elif kind in BACKWARD_KINDS:
            before = (Kind.F, stage, number)
            if stage + 1 < stages:
                before = (BACKWARD, stage + 1, number)
            ready = max(ready, end[before])
        ready += 2 if kind == Kind.B else 1
        free[device] = ready
        end[BACKWARD if kind in BACKWARD_KINDS else kind, stage, number] = ready
    return max(free.values())


BACKWARD = "backward"


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of this process, and the result."""
    begin = process_time()
    result = run(*arguments)
    return process_time() - begin, result


def measure(name: str, p: int, m: int, rounds: int) -> list[float]:
    """Medians: lower and theirs, simulate, theirs and the loop, in seconds."""
    schedule = catalog.make(name, devices=p, micro_batches=m)
    schedule.report.raise_if_bad()
    stages = schedule.stages
    home = schedule.placement.pipes[0].__getitem__
    ops = ordered(schedule)
    found: list[list[float]] = []
    for _ in range(rounds + 1):
        ours, program = timed(lower, schedule)
        actions = actions_of(schedule)
        other, lowered = timed(theirs._add_send_recv, actions, home, stages)
        simulated, trace = timed(simulate, program)
        unit, _ = timed(theirs._simulate_comms_compute, lowered, home, stages)
        loop, makespan = timed(plain_loop, ops, stages)
        assert makespan == trace.makespan * stages // schedule.devices
        found.append([ours, other, simulated, unit, loop])
        print(".", end="", file=sys.stderr, flush=True)
    return [statistics.median(column) for column in zip(*found[1:])]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    lines = [
        "# Lowering and timing, beside torch.distributed.pipelining and a plain loop",
        "",
        f"CPU seconds, medians of {arguments.rounds} repetitions in turn, one core of "
        f"a shared x86-64 machine, torch {torch.__version__.split('+')[0]}.",
        "",
        "| schedule | P, M | lower | torch | | simulate | torch, unit steps | loop | |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for (p, m), name in itertools.product(SIZES, NAMES):
        ours, other, simulated, unit, loop = measure(name, p, m, arguments.rounds)
        lines.append(
            f"| {name} | {p}, {m} | {ours:.3f} | {other:.3f} | {other / ours:.0f} × | "
            f"{simulated:.3f} | {unit:.3f} | {loop:.3f} | {unit / simulated:.0f} × |"
        )
    print(file=sys.stderr)
    text = "\n".join([*lines, ""])
    arguments.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
