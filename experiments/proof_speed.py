"""How long deadlock check and proof take, and that every row is proved to P = 16.

Processor time of this process, the least of some runs, after a small schedule has
loaded what is compiled.

    python experiments/proof_speed.py
        writes experiments/results/proof_speed.md
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeproof.sched import CATALOG, Program, catalog, lower, prove
from pipeproof.sched.deadlock import deadlocks
from pipeproof.sched.matching import mismatches
from pipeproof.sched.row import Case

RESULT = Path(__file__).parent / "results" / "proof_speed.md"


def seconds(function: Callable[[], Any], runs: int) -> float:
    """Processor time of a call, the least of some."""
    times = []
    for _ in range(runs):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def made(name: str, p: int, m: int, **options: Any) -> Program:
    """A program of the catalogue."""
    return lower(catalog.make(name, devices=p, micro_batches=m, **options))


def passes(program: Program) -> None:
    """What `check` does with a program."""
    assert not mismatches(program)
    assert not deadlocks(program)


def proved(most: int) -> tuple[int, int, float]:
    """Rows, programs proved, and seconds, at P = 2 … most."""
    started, programs, rows = time.process_time(), 0, set()
    for name, row in CATALOG.items():
        for p in range(2, most + 1):
            for m in {p - 1, p, 2 * p}:
                if row.allows(Case(p, m)):
                    prove(made(name, p, m)).raise_if_bad()
                    programs, rows = programs + 1, rows | {name}
    return len(rows), programs, time.process_time() - started


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    prove(made("1f1b", 16, 512)).raise_if_bad()
    lines = [
        "# How long a proof takes",
        "",
        f"Processor time on one core of a shared {platform.machine()} machine of "
        f"{os.cpu_count()} cores, the least of {arguments.runs} runs.",
        "",
        "| program | instructions | deadlock check, s | proof, s |",
        "|-|-|-|-|",
    ]
    for name, p, m in (
        ("1f1b", 8, 64),
        ("1f1b", 64, 1024),
        ("zb-h1", 64, 1024),
        ("1f1b", 64, 2700),
    ):
        program = made(name, p, m)
        checked = seconds(lambda program=program: passes(program), arguments.runs)
        proof = "not measured"
        if m <= 1024:
            proof = f"{seconds(lambda p=program: prove(p), arguments.runs):.2f}"
        lines.append(
            f"| {name}, P={p}, M={m} | {len(program):,} | {checked:.2f} | {proof} |"
        )
        print(lines[-1], flush=True)
    rows, programs, took = proved(16)
    lines += [
        "",
        f"Every one of the {rows} rows of the catalogue is proved at every P from 2 "
        "to 16 with P-1, P and 2P micro-batches, where it takes them: "
        f"{programs} programs in {took:.0f} s.",
        "",
        "Repeat with `python experiments/proof_speed.py`.",
    ]
    assert rows == len(CATALOG)
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
