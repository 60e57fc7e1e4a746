"""A sample of the edits of one cell of torch's CSV with communication."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from tally import Tallies, Tally
from torch_under_proof import Case, Company, actions, text_of

from pipeproof.sched import prove
from pipeproof.sched.errors import PipeproofError
from pipeproof.sched.interop.torch_csv import read_torch_csv
from pipeproof.sched.interop.torch_program import torch_program

STILL_S = 5.0
"""Seconds without progress after which what is rejected counts as hanging."""


def edits_of_csv(text: str) -> Iterator[tuple[str, str, str]]:
    """(kind of edit, in words, text) of every edit of a cell but of weights' ones."""
    rows = [line.split(",") for line in text.splitlines()]
    stages = 1 + max(int(cell[0]) for row in rows for cell in row)
    micro_batches = {c[-1] for row in rows for c in row if c[-1].isdigit()}

    def joined(rank: int, new: list[str]) -> str:
        edited = [new if r == rank else row for r, row in enumerate(rows)]
        return "".join(",".join(row) + "\n" for row in edited)

    for rank, row in enumerate(rows):
        for at, cell in enumerate(row):
            if cell.endswith("SHARD"):
                continue  # it matters to sharded weights only
            rest = row[:at] + row[at + 1 :]
            reduces = cell.endswith("GRAD")
            name = "REDUCE_GRAD" if reduces else "op"
            if "SEND" in cell or "RECV" in cell:
                name = "transfer"
            yield f"drop a {name}", cell, joined(rank, rest)
            yield f"double a {name}", cell, joined(rank, [*row[:at], cell, *row[at:]])
            for to in range(len(rest) + 1):
                if to != at:
                    moved = [*rest[:to], cell, *rest[to:]]
                    yield f"move a {name}", f"{cell} to {to}", joined(rank, moved)
            if reduces:
                continue
            for stage in range(stages):
                other = f"{stage}{cell[1:]}"
                if other != cell:
                    new = [*row[:at], other, *row[at + 1 :]]
                    yield f"{name} of another stage", other, joined(rank, new)
            for micro_batch in sorted(micro_batches):
                other = f"{cell[:-1]}{micro_batch}"
                if other != cell:
                    new = [*row[:at], other, *row[at + 1 :]]
                    yield f"{name} of another micro-batch", other, joined(rank, new)


def accepted(text: str) -> bool:
    """Whether the reader, `check` and `prove` have nothing against it."""
    try:
        csv = read_torch_csv(text, agreeing=False)
        return csv.schedule.report.ok and prove(torch_program(csv)).ok
    except PipeproofError:
        return False


def of_csvs(cases: list[Case], sample: int) -> Tallies:
    """The tallies of a sample, for each kind of edit as many accepted as refused."""
    tallies: Tallies = defaultdict(Tally)
    dice = random.Random(1)
    company = Company(2)
    for case in cases:
        chosen: dict[tuple[str, bool], list[tuple[str, str]]] = defaultdict(list)
        every = list(edits_of_csv(text_of(actions(case))))
        dice.shuffle(every)
        for name, what, text in every:
            of_kind = chosen[name, accepted(text)]
            if len(of_kind) < sample:
                of_kind.append((what, text))
        for (name, ours), mutants in chosen.items():
            for what, text in mutants:
                edited = replace(case, edited=text)
                outcome = company.run(edited, STILL_S)
                if ours and not outcome.right:  # was it only slow?
                    outcome = company.run(edited)
                tallies[name].add(ours, outcome.right, f"{case.name}: {name}: {what}")
                print(name, what, ours, outcome, file=sys.stderr, flush=True)
    company.end()
    return tallies
