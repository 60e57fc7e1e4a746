"""`pipeproof show`."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace

import click

from pipeproof.cli.options import Conditions, Wanted
from pipeproof.cli.output import emit_json, emit_text, has_colours
from pipeproof.cli.predict import predict, sizes
from pipeproof.cli.source import load
from pipeproof.sched import CATALOG, ParameterError
from pipeproof.sched.exact import Number

PIPED_COLUMNS = 20_000


def show_grid(
    wanted: Wanted, conditions: Conditions, tick: Number | None, *, as_json: bool
) -> None:
    """Print a schedule's grid.

    Raises:
        ParameterError: it is wider than the terminal, or than is sensible.
    """
    wanted, conditions = _or_its_figure(wanted, conditions)
    schedule = load(wanted)
    trace = predict(schedule, conditions)
    terminal = _is_terminal() and not as_json
    room = shutil.get_terminal_size().columns if terminal else PIPED_COLUMNS
    if tick is not None and tick > 0 and trace.makespan / tick > PIPED_COLUMNS:
        raise _too_wide(room, _tick(trace.makespan, max(1, room // 8)), terminal)
    try:
        lines = trace.grid(tick).splitlines()
    except ParameterError:
        if tick is not None:
            raise
        raise _too_wide(
            room, _tick(trace.makespan, max(1, room // 8)), terminal
        ) from None
    width = max(map(len, lines))
    if width > room:
        head = lines[0].index("|") + 2
        cell = max(map(len, max(lines, key=len)[head:].split()), default=2) + 1
        columns = max(1, (room - head + 1) // cell)
        raise _too_wide(room, _tick(trace.makespan, columns), terminal)
    if as_json:
        emit_json({**sizes(schedule), "grid": lines})
        return
    click.echo(schedule.summary)
    if has_colours():
        from pipeproof.cli.painting import painted

        emit_text(painted(lines, schedule))
    else:
        click.echo("\n".join(lines))


def _or_its_figure(wanted: Wanted, conditions: Conditions) -> tuple[Wanted, Conditions]:
    """Sizes and times of the publication's figure for a name without sizes."""
    row = CATALOG.get(wanted.source)
    if row is None or wanted.devices is not None or wanted.micro_batches is not None:
        return wanted, conditions
    figure = row.figure
    missing = {
        key: value
        for key, value in figure.options.items()
        if getattr(wanted.features, key) is None
    }
    features = replace(wanted.features, **missing)
    names = ("forward", "input_grad", "weight_grad")
    if all(getattr(conditions, name) is None for name in (*names, "backward")):
        times = {name: getattr(figure, name) for name in names}
        conditions = replace(conditions, **times)
    shown = Wanted(wanted.source, figure.p, figure.m, features, wanted.steps)
    return shown, conditions


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _tick(makespan: Number, columns: int) -> str:
    """The width of a column with which `columns` of them do."""
    width = float(makespan) / columns
    return str(math.ceil(width)) if width >= 1 else f"{1.05 * width:.2g}"


def _too_wide(room: int, tick: str, terminal: bool) -> ParameterError:
    elsewhere = ", pipe it into `less -S`" if terminal else ""
    return ParameterError(
        f"the grid is wider than {room:,} characters: draw a column only every {tick} "
        f"units of time with --tick {tick}{elsewhere}, or export it --to svg or chrome"
    )
