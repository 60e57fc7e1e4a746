"""How many mutants were what, and the table of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SHOWN = 12
"""Mutants on which the opinions differ that are spelled out."""


@dataclass
class Tally:
    """Of one kind of edit, how many were what.

    Attributes:
        counts: (the first opinion accepts, the second one does) → how many.
        odd: those where they differ, in words.
    """

    counts: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    odd: list[str] = field(default_factory=list)

    def add(self, ours: bool, theirs: bool, what: str) -> None:
        """One mutant."""
        self.counts[ours, theirs] += 1
        if ours != theirs:
            self.odd.append(what)


Tallies = dict[str, Tally]


def accepted_of(tallies: Tallies) -> tuple[int, int]:
    """How many of the right ones are accepted, and how many right ones there are."""
    total = _total(tallies)
    return total[True, True], total[True, True] + total[False, True]


def table(tallies: Tallies, apart: Tallies | None = None) -> list[str]:
    """A row for each kind of edit, and their sum.

    Args:
        tallies: by kind.
        apart: rows that are not in the sum.
    """
    lines = [
        "| edit | mutants | wrong, rejected | wrong, accepted | right, accepted "
        "| right, rejected |",
        "|-|-|-|-|-|-|",
    ]
    lines += [_row(name, tally.counts) for name, tally in sorted(tallies.items())]
    lines.append(_row("all", _total(tallies)))
    return lines + [_row(name, tally.counts) for name, tally in (apart or {}).items()]


def _total(tallies: Tallies) -> Counter[tuple[bool, bool]]:
    return sum((tally.counts for tally in tallies.values()), Counter())


def _row(name: str, counts: Counter[tuple[bool, bool]]) -> str:
    cells = (counts[False, False], counts[True, False])
    cells += (counts[True, True], counts[False, True])
    return f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |"


def odd(tallies: Tallies) -> list[str]:
    """What the two opinions do not agree on."""
    every = [what for tally in tallies.values() for what in tally.odd]
    if not every:
        return []
    shown = [f"* {what}" for what in every[:SHOWN]]
    more = f"… and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ["", "The two opinions differ on:", "", *shown, *filter(None, ["", more])]
