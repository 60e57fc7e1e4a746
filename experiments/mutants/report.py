"""What is edited, what is found, and the report on it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from of_csvs import of_csvs
from of_programs import MORE_RUNS, RUNS, of_programs
from of_schedules import of_schedules
from tally import Tallies, accepted_of, odd, table
from torch_under_proof import Case

from pipeproof.sched import Program, Schedule, catalog, lower, recompute, with_steps

ROOT = Path(__file__).parent.parent.parent
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
        *map(lower, skipping_and_tied()),
        *map(lower, stepping()),
    ]


def skipping_and_tied() -> list[Schedule]:
    """Schedules of models with skip connections and with tied weights."""
    linear, looped = made("1f1b", 3, 2), made("interleaved", 2, 2)
    return [
        linear.with_skips([(0, 2)]),
        recompute(linear, "always").with_skips([(0, 2)]),
        made("zb-h1", 3, 2).with_skips([(0, 2)]).with_ties([(0, 2)]),
        looped.with_skips([(0, 2), (0, 3)]).with_ties([(0, 3)]),
        looped.with_ties([(0, 2), (0, 1, 3)]),
    ]


def stepping() -> list[Schedule]:
    """Schedules that update the weights: alone, behind REDUCEs, behind a tie's sum."""
    tied = made("interleaved", 2, 2).with_ties([(0, 3)])
    return [
        with_steps(made("zb-h1", 2, 2)),
        with_steps(made("gems", 2, 2)),
        with_steps(tied),
    ]


def main(description: str) -> None:
    """Count, and write the tables."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--programs", type=int, default=150, help="at most, of each edit of a program"
    )
    parser.add_argument("--sample", type=int, default=3, help="of each edit of a CSV")
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
        "A program has no scale of its own to get wrong: a forward of the last stage "
        "takes the loss of the micro-batch that it names, with its targets and its "
        "weight, so that a wrong scale is an op of another micro-batch, and a missing "
        "or a second one a backward that is missing or comes twice. Both opinions have "
        "the weight in each term. In a CSV it is REDUCE_GRAD that scales.",
        "",
        f"One shared x86-64 machine of {os.cpu_count()} cores; repeat with "
        "`python experiments/mutants`.",
    ]
    arguments.output.write_text("\n".join(lines) + "\n")


def section(
    title: str, text: str, found: Tallies, apart: Tallies | None = None
) -> list[str]:
    """A part of the report: what was done, the table, and where opinions differ.

    Args:
        title: of it.
        text: in which `{right}` stands for how many of the right ones are accepted.
        found: by kind of edit.
        apart: rows that are not in the sum.
    """
    accepted, right = accepted_of(found)
    counted = f"{accepted} of {right} ({accepted / right:.1%})"
    text = text.format(right=counted)
    return [f"## {title}", "", text, "", *table(found, apart), *odd(found), ""]


def about_schedules(schedules: list[Schedule]) -> list[str]:
    """The first part."""
    found = of_schedules(schedules)
    accepted, right = accepted_of(found.tallies)
    twice = found.no_schedules.counts
    whole = right + twice[True, True] + twice[False, True]
    return section(
        "Schedules: `check` against an interpreter",
        f"Every edit of {len(schedules)} schedules. Of the right ones {{right}} are "
        "accepted. A schedule names each op once; what names an R twice, and is right "
        "but for the time it takes, is none, and has a row of its own. With those it "
        f"would be {accepted} of {whole} ({accepted / whole:.1%}).\n\n"
        f"Of the accepted, {found.trained} different ones were trained; in "
        f"{found.right} loss and gradients equal those of the reference bit by bit.",
        found.tallies,
        {"an R that stands already": found.no_schedules},
    )


def about_programs(programs: list[Program], most: int) -> list[str]:
    """The second part."""
    return section(
        "Programs: `prove` against a player in random orders",
        f"Of {len(programs)} programs, some with skip connections and ties, every "
        f"edit, but no more than {most} random ones of each kind of each one. Of the "
        "right ones {right} are accepted. What is proved was played in "
        f"{RUNS} random orders, and in up to {2 * RUNS} that put one use of a slot off "
        "for another; what is refuted counts as right if it is in "
        f"{MORE_RUNS} and {2 * MORE_RUNS} of them.",
        of_programs(programs, most),
    )


def about_csvs(cases: list[Case], sample: int) -> list[str]:
    """The third part."""
    return section(
        "torch's CSV with communication: reader and `prove` against torch",
        f"A sample of each kind of edit of {len(cases)} files, as many accepted as "
        "rejected where there are, run by torch's own runtime, two processes with "
        "gloo; ranks that stood still were ended. Of the right ones in the sample "
        "{right} are accepted.",
        of_csvs(cases, sample),
    )
