"""A cycle of waits, drawn for a person: a line per device, an arrow per wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeproof.sched.program import Program

DRAWN = 8
"""Instructions of a cycle that a picture has room for; the others are counted."""


def drawn(program: Program, ring: Sequence[int]) -> tuple[str, ...]:
    """The cycle as lines: a device's instructions in program order, and their waits.

    An instruction that waits for its left neighbour has `<--` between them; any
    other wait is an arrow below it, to the number of what it waits for. Of a cycle
    of more than `DRAWN` instructions the first ones are drawn, and a last line says
    how many are not, and what the way through them begins and ends with.

    Args:
        program: whose instructions.
        ring: their numbers, each waiting for the next, and the last for the first.
    """
    shown = ring[:DRAWN]
    waits = set(zip(shown, [*ring[1:], ring[0]]))
    devices = sorted({int(program.device[i]) for i in shown})
    margin = max(len(f"device {device}") for device in devices)
    lines = []
    for device in devices:
        row = sorted({i for i in shown if program.device[i] == device})
        line, below = f"{f'device {device}':<{margin}} | ", ""
        for left, index in zip([-1, *row], row):
            if left >= 0:
                line += " <-- " if (index, left) in waits else "  ...  "
            far = [v for u, v in sorted(waits) if u == index and v != left]
            if far:
                below = below.ljust(len(line)) + "`-> " + ", ".join(map(str, far))
            line += f"{index} {program.label(index)}"
            if len(below) >= len(line):  # room for the next arrow
                line = line.ljust(len(below) + 1)
        lines.append(line.rstrip())
        if below:
            lines.append(below)
    if left_out := len(ring) - len(shown):
        lines.append(
            f"… {left_out:,} more of the cycle's {len(ring):,} instructions are not "
            f"drawn: {ring[DRAWN]} waits, through them, for {ring[0]}"
        )
    return tuple(lines)
