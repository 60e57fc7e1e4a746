"""A trace as a Gantt chart in plain SVG: one row a device, one box an op.

Boxes are coloured by kind and carry the micro-batch. Where a device holds more
than one stage, the further a stage is along the model the paler its boxes. The
ops of an overlap group share the height of their row. What is offloaded runs as a
strip along the lower edge of the row while its copy takes time, and along the upper
edge on its way back. Hovering shows op and times. Every name is escaped, and nothing
is fetched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

import numpy as np

from pipeproof.sched.errors import ParameterError
from pipeproof.sched.exact import Number
from pipeproof.sched.instructions import Action
from pipeproof.sched.ir import Kind, Op
from pipeproof.sched.trace import Trace

MAX_BOXES = 50_000

# Paul Tol's light scheme: told apart by colour-blind eyes, dark text on all.
COLOURS = {
    Kind.F: ("#77aadd", "forward"),
    Kind.B: ("#bbcc33", "backward"),
    Kind.I: ("#44bb99", "input gradient"),
    Kind.W: ("#eedd88", "weight gradient"),
    Kind.R: ("#ee8866", "recompute"),
    Kind.OFFLOAD: ("#aaaa00", "offload"),
    Kind.RELOAD: ("#ffaabb", "reload"),
    Kind.STEP: ("#99ddff", "optimizer step"),
}
OTHER = ("#bbbbbb", "other")
FONT = "font-family='system-ui, sans-serif'"

_LEFT, _TOP, _ROW, _GAP, _BELOW = 76, 46, 26, 4, 30
_STRIP = 4
_CHARACTER = 6.2  # width of a digit at 10 px


def draw_svg(trace: Trace, *, title: str | None = None, width: int = 1200) -> str:
    """The chart, ending in a newline.

    Args:
        trace: predicted or measured.
        title: over the chart; default the schedule's name and sizes.
        width: of the whole picture in pixels.

    Raises:
        ParameterError: so many ops that no eye could tell them apart.
    """
    program = trace.program
    if len(program.computes) > MAX_BOXES:
        raise ParameterError(
            f"{len(program.computes):,} ops are too many for one picture (at most "
            f"{MAX_BOXES:,}): export a Chrome trace, or draw fewer micro-batches"
        )
    if width < 200:
        raise ParameterError(f"width must be at least 200 pixels, got {width}")
    devices = program.schedule.devices
    height = _TOP + devices * (_ROW + _GAP) + _BELOW
    heading = escape(title or program.schedule.summary)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}' {FONT} font-size='12' role='img'>",
        f"<title>{heading}</title>",
        f"<rect width='{width}' height='{height}' fill='#fff'/>",
        f"<text x='8' y='18' font-size='14' font-weight='600'>{heading}</text>",
        *_legend(trace, width),
    ]
    per_unit = (width - _LEFT - 12) / (float(trace.makespan) or 1)
    bottom = _TOP + devices * (_ROW + _GAP)
    for time in ticks(trace.makespan):
        x = _LEFT + time * per_unit
        parts.append(
            f"<path d='M{x:.2f} {_TOP - 4}V{bottom}' stroke='#ddd'/>"
            f"<text x='{x:.2f}' y='{bottom + 14}' text-anchor='middle' "
            f"font-size='10' fill='#555'>{time:g}</text>"
        )
    for device in range(devices):
        y = _TOP + device * (_ROW + _GAP)
        parts.append(
            f"<text x='8' y='{y + 17}'>device {device}</text>"
            f"<rect x='{_LEFT}' y='{y}' width='{width - _LEFT - 12}' "
            f"height='{_ROW}' fill='#f4f4f4'/>"
        )
        parts.extend(_row(trace, device, y, per_unit))
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(end: Number, about: int = 10) -> list[float]:
    """Round times from 0 up to `end`, some ten of them."""
    if not end > 0:
        return [0.0]
    rough = float(end) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [i * step for i in range(int(float(end) / step) + 1)]


def _legend(trace: Trace, width: int) -> Iterator[str]:
    schedule = trace.program.schedule
    x = float(width - 12)
    kinds = [kind for kind in COLOURS if schedule.has(kind)]
    for colour, name in [COLOURS[kind] for kind in reversed(kinds)]:
        x -= 16 + len(name) * 6.4
        yield (
            f"<rect x='{x:.0f}' y='26' width='10' height='10' rx='2' "
            f"fill='{colour}'/>"
            f"<text x='{x + 14:.0f}' y='35' font-size='11'>{name}</text>"
        )
        x -= 12


def _row(trace: Trace, device: int, y: float, per_unit: float) -> Iterator[str]:
    program = trace.program
    mine = program.computes[program.device[program.computes] == device]
    held = sorted({op.stage for op in program.schedule.row(device)})
    for index in mine.tolist():
        start, end = float(trace.start[index]), float(trace.end[index])
        first, count = int(program.first_op[index]), int(program.op_count[index])
        times = f"{start:.6g} – {end:.6g}"
        for number in range(count):
            op = program.schedule.ops[first + number]
            share = _ROW / count
            paler = held.index(op.stage) / len(held)
            x, wide = _LEFT + start * per_unit, (end - start) * per_unit
            yield _box(op, x, y + number * share, wide, share, paler, times)
    yield from _copies(trace, device, y, per_unit)


def _copies(trace: Trace, device: int, y: float, per_unit: float) -> Iterator[str]:
    program = trace.program
    mine = (program.action == Action.COPY) & (program.device == device)
    for index in np.flatnonzero(mine).tolist():
        start, end = float(trace.start[index]), float(trace.end[index])
        if end == start:
            continue
        op = program.schedule.ops[int(program.first_op[index])]
        edge = y if op.kind == Kind.RELOAD else y + _ROW - _STRIP
        x, wide = _LEFT + start * per_unit, (end - start) * per_unit
        stream = program.streams[program.stream[index]]
        times = f"{start:.6g} – {end:.6g}, {stream}"
        yield _box(op, x, edge, wide, _STRIP, 0, times, named=False)


def _box(
    op: Op,
    x: float,
    y: float,
    wide: float,
    high: float,
    paler: float,
    times: str,
    *,
    named: bool = True,
) -> str:
    colour = COLOURS.get(op.kind, OTHER)[0]
    text = str(op.micro_batch) + (f".{op.slice}" if op.slice else "")
    label = ""
    if named and wide > len(text) * _CHARACTER + 2:
        label = (
            f"<text x='{x + wide / 2:.2f}' y='{y + high / 2 + 3.5:.1f}' "
            f"text-anchor='middle' font-size='10'>{text}</text>"
        )
    edge = min(0.5, wide / 8)  # a hairline between neighbours, however narrow
    return (
        f"<g><title>{op}: {times}</title>"
        f"<rect x='{x + edge:.2f}' y='{y:.1f}' width='{max(wide - 2 * edge, 0):.2f}' "
        f"height='{high:.1f}' rx='1.5' fill='{colour}' "
        f"fill-opacity='{1 - 0.65 * paler:.2f}'/>{label}</g>"
    )


def draw_curve(
    time: list[Any],
    amount: list[Any],
    *,
    title: str,
    end: Number,
    top: Number,
    width: int = 380,
    height: int = 96,
) -> str:
    """A step curve under a title, as SVG: what is alive from each time on.

    Args:
        time: of each change, ascending.
        amount: from that time on.
        title: over the curve.
        end: right edge, in time.
        top: upper edge, so that curves beside each other compare.
        width: in pixels.
        height: likewise.
    """
    x_unit, y_unit = (width - 2) / (float(end) or 1), (height - 26) / (float(top) or 1)
    columns: dict[int, tuple[float, float]] = {}  # of a pixel: most, and last
    level = 0.0
    for when, value in zip(time, amount):
        column = round(float(when) * x_unit)
        most, _ = columns.get(column, (level, level))
        level = float(value)
        columns[column] = max(most, level), level
    path = f"M1 {height - 2}"
    for column, (most, last) in columns.items():
        y_most, y_last = (height - 2 - y * y_unit for y in (most, last))
        path += f"H{column + 1}V{y_most:.1f}V{y_last:.1f}"
    path += f"H{width - 1}V{height - 2}Z"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}' {FONT} role='img'>"
        f"<text x='1' y='14' font-size='12'>{escape(title)}</text>"
        f"<path d='M1 {height - 1.5}H{width - 1}' stroke='#ccc'/>"
        f"<path d='{path}' fill='#77aadd' fill-opacity='.55' stroke='#4477aa'/></svg>"
    )
