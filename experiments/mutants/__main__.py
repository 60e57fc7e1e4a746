"""Single edits of right schedules, programs and CSV files: is each wrong one found?

Three parts, and in each a second opinion that shares no code with the first:

* schedules: every edit of an op. `check` against an interpreter of schedules;
  what `check` accepts is trained, and its gradients compared bit by bit.
* programs: edits of an instruction, all or many of each kind. `prove` against a
  player of programs in random orders (`tests/programs.py`).
* torch's CSV with communication: a sample of the edits of a cell. The reader and
  `prove` against torch's own runtime, two processes with gloo, whose gradients are
  compared with those of a step without a pipeline.

    python experiments/mutants
        writes experiments/results/mutants.md
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
sys.path += [str(ROOT / "experiments"), str(ROOT / "tests")]  # the other opinions

from of_csvs import of_csvs  # noqa: E402
from of_programs import MORE_RUNS, RUNS, of_programs  # noqa: E402
from of_schedules import of_schedules  # noqa: E402
from tally import accepted_of, odd, table  # noqa: E402
from torch_under_proof import Case  # noqa: E402

from pipeproof.sched import Program, Schedule, catalog, lower, recompute  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "mutants.md"


def made(name: str, p: int, m: int, **options: Any) -> Schedule:
    """Of the catalogue."""
    return catalog.make(name, devices=p, micro_batches=m, **options)


def bases() -> list[Schedule]:
    """Small right schedules that use the language up."""
    return [
        made("1f1b", 2, 3),
        recompute(made("gpipe", 2, 2), "always"),
        recompute(made("1f1b", 3, 3), "except-last"),
        made("zb-h1", 2, 3),
        made("interleaved", 2, 2),
        made("zb-v", 2, 2),
        made("chimera", 2, 2),
        made("seq1f1b", 2, 2),
        made("pipeoffload", 2, 2),
        made("dualpipe-v", 2, 4),
    ]


def larger() -> list[Schedule]:
    """More of them."""
    return [
        made("1f1b", 4, 4),
        made("zb-h2", 2, 3),
        made("hanayo", 2, 2),
        made("gems", 2, 2),
        made("dualpipe", 2, 4),
        made("bpipe", 4, 4),
        recompute(made("slimpipe", 2, 2), "always"),
        recompute(made("interleaved", 2, 4), "adaptive"),
    ]


def programs() -> list[Program]:
    """Of the small ones, lowered in several ways."""
    first = made("1f1b", 2, 3)
    return [
        *(lower(schedule) for schedule in bases()[:-1]),
        lower(first, receives="late", transfers="blocking"),
        lower(first, messages="grouped"),
    ]


def main() -> None:
    """Count, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--programs", type=int, default=150, help="at most, of each edit of a program"
    )
    parser.add_argument("--sample", type=int, default=6, help="of each edit of a CSV")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Mutants: single edits of what is right",
        "",
        "A mutant is wrong if it does not come to its end, or to other gradients than "
        "training without a pipeline. That is decided by a second opinion, never by "
        "the one that is tested. No mutant made a command hang.",
        "",
        *about_schedules([*bases(), *larger()]),
        *about_programs(programs(), arguments.programs),
        *about_csvs(
            [
                Case("1F1B", 2, 1, 3, False),
                Case("Interleaved1F1B", 2, 2, 2, False),
                Case("InterleavedZeroBubble", 2, 2, 2, False),
                Case("ZBVZeroBubble", 2, 2, 2, False),
            ],
            arguments.sample,
        ),
        "Programs carry no scale: the executor puts each micro-batch's weight on its "
        "loss, and its gradients are compared with the reference's in the tests. In a "
        "CSV it is REDUCE_GRAD that scales.",
        "",
        f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with "
        "`python experiments/mutants`.",
    ]
    arguments.output.write_text("\n".join(lines) + "\n")


def about_schedules(schedules: list[Schedule]) -> list[str]:
    """The first part."""
    found = of_schedules(schedules)
    accepted, right = accepted_of(found.tallies)
    twice = found.no_schedules.counts
    whole = right + twice[True, True] + twice[False, True]
    return [
        "## Schedules: `check` against an interpreter",
        "",
        f"Every edit of {len(schedules)} schedules. Of the right ones {accepted} of "
        f"{right} ({accepted / right:.1%}) are accepted. A schedule names each op "
        "once; what names an R twice, and is right but for the time it takes, is none, "
        "and has a row of its own. With those it would be "
        f"{accepted} of {whole} ({accepted / whole:.1%}).",
        "",
        f"Of the accepted, {found.trained} different ones were trained; in "
        f"{found.right} loss and gradients equal those of the reference bit by bit.",
        "",
        *table(found.tallies, {"an R that stands already": found.no_schedules}),
        *odd(found.tallies),
        "",
    ]


def about_programs(programs: list[Program], most: int) -> list[str]:
    """The second part."""
    found = of_programs(programs, most)
    accepted, right = accepted_of(found)
    return [
        "## Programs: `prove` against a player in random orders",
        "",
        f"Of {len(programs)} programs every edit, but no more than {most} random ones "
        f"of each kind of each program. Of the right ones {accepted} of "
        f"{right} ({accepted / right:.1%}) are accepted. What is proved was played in "
        f"{RUNS} random orders, and in up to {2 * RUNS} that put one use of a slot off "
        "for another; what is refuted counts as right if it is in "
        f"{MORE_RUNS} and {2 * MORE_RUNS} of them.",
        "",
        *table(found),
        *odd(found),
        "",
    ]


def about_csvs(cases: list[Case], sample: int) -> list[str]:
    """The third part."""
    found = of_csvs(cases, sample)
    accepted, right = accepted_of(found)
    return [
        "## torch's CSV with communication: reader and `prove` against torch",
        "",
        f"A sample of each kind of edit of {len(cases)} files, as many accepted as "
        "rejected where there are, run by torch's own runtime, two processes with "
        "gloo; ranks that stood still were ended. Of the right ones in the sample "
        f"{accepted} of {right} are accepted.",
        "",
        *table(found),
        *odd(found),
        "",
    ]


if __name__ == "__main__":
    main()
