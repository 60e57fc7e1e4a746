"""A grid in the colours of the papers' figures, for terminals that have them."""

from __future__ import annotations

import re

from rich.text import Text

from pipeproof.sched import Kind, Schedule
from pipeproof.sched.interop.svg import COLOURS, OTHER

PALER = 0.6
"""How far towards white the last of a device's chunks goes."""

_CELL = re.compile(r"[^ ]+ *")
_OP = re.compile(r"([0-9]*)([A-Z])[0-9]+[^&]*")


def painted(lines: list[str], schedule: Schedule) -> list[Text]:
    """A grid's lines with each op on the colour of its kind, and a legend.

    Blue is forward and green backward, as in most papers; where a device holds
    more than one stage, the further one is along the model the paler its ops.

    Args:
        lines: of `Trace.grid`, a device each.
        schedule: that they draw.
    """
    held = [sorted({op.stage for op in schedule.row(d)}) for d in range(len(lines))]
    legend = Text()
    for kind, (colour, name) in COLOURS.items():
        if schedule.has(kind):
            legend.append(f" {name} ", style=f"black on {colour}").append("  ")
    return [*map(_painted, lines, held), legend]


def _painted(line: str, stages: list[int]) -> Text:
    text = Text(line)
    style = ""
    for cell in _CELL.finditer(line, line.index("|") + 2):
        first, last = cell.span()
        last -= cell[0].endswith(" ")  # the gap between two cells
        if cell[0].startswith("."):
            text.stylize("dim", first, last)
        elif cell[0].startswith("-"):
            text.stylize(style, first - 1, last)
        else:
            for op in _OP.finditer(line, first, last):
                style = _style(op, stages)
                text.stylize(style, *op.span())
    return text


def _style(op: re.Match[str], stages: list[int]) -> str:
    colour, _ = COLOURS.get(Kind[op[2]], OTHER)
    paler = PALER * stages.index(int(op[1])) / len(stages) if op[1] else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    red, green, blue = (round(c + (255 - c) * paler) for c in channels)
    return f"black on #{red:02x}{green:02x}{blue:02x}"
