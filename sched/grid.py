"""A trace as text: one line a device, one column a tick."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number

if TYPE_CHECKING:
    from pipeproof.sched.trace import Trace

MAX_COLUMNS = 20_000


def draw(trace: Trace, tick: Number | None = None) -> str:
    """One line a device; `..` is idle, and `--` goes on with the op before it.

    A column shows the op that runs at its left edge. Ops without a duration do
    not appear.

    Args:
        trace: what to draw.
        tick: width of a column in time; default the greatest common divisor of
            exact times, the shortest op of others.

    Raises:
        ParameterError: the tick is not above 0, or gives too many columns.
    """
    program = trace.program
    computes = program.computes
    lasting = computes[(trace.end[computes] > trace.start[computes]).astype(bool)]
    if tick is None:
        tick = _tick(trace, lasting)
    if tick <= 0:
        raise ParameterError(f"tick must be above 0, got {tick}")
    columns = _column(trace.makespan, tick)
    if columns > MAX_COLUMNS:
        raise ParameterError(
            f"{columns:,} columns of {tick} are too many to read: give a larger tick"
        )
    flat = str(program.schedule.placement) == "linear"
    cells: list[list[str | None]] = [
        [None] * columns for _ in range(program.schedule.devices)
    ]
    for index in lasting.tolist():
        first = _column(trace.start[index], tick)
        last = _column(trace.end[index], tick)
        row = cells[program.device[index]]
        for column in range(first, min(last, columns)):
            row[column] = "-"
        if first < last:
            row[first] = program.label(index, short=flat)
    width = max((len(cell) for row in cells for cell in row if cell), default=2)
    width = max(width, 2)
    digits = len(str(program.schedule.devices - 1))
    lines = []
    for device, row in enumerate(cells):
        words = [
            "." * width if c is None else "-" * width if c == "-" else c.ljust(width)
            for c in row
        ]
        lines.append(f"device {device:>{digits}} | {' '.join(words)}".rstrip())
    return "\n".join(lines)


def _column(time: Any, tick: Number) -> int:
    """The first column whose left edge is not before this time."""
    place: Number = time / tick
    if isinstance(place, float):
        place = round(place, 6)  # 0.1 + 0.2 is one tick of 0.3
    return math.ceil(place)


def _tick(trace: Trace, lasting: np.ndarray) -> Number:
    if not len(lasting):
        return 1
    if trace.start.dtype.kind == "f":
        return float((trace.end[lasting] - trace.start[lasting]).min())
    times = {Fraction(t) for t in trace.start[lasting]} | {
        Fraction(t) for t in trace.end[lasting]
    }
    common = math.lcm(*(time.denominator for time in times))
    return Fraction(math.gcd(*(int(time * common) for time in times)), common)
