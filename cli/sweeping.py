"""`pipeproof sweep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from functools import partial
from itertools import product
from typing import Any

import click

from pipeproof.cli.options import LOWERING, Conditions
from pipeproof.cli.output import emit_json, emit_table, shown
from pipeproof.cli.predict import LONG, cluster_of, cost_of
from pipeproof.cli.progress import bar, watched
from pipeproof.cli.shape import Described, Shape
from pipeproof.cli.source import MAX_CELLS
from pipeproof.sched import ParameterError, Schedule
from pipeproof.sim import Cost
from pipeproof.sim.sweep import Point, Result, grid, sweep

MAX_PRINTED, MAX_KEPT = 10_000, 1_000_000
"""Points of a sweep, printed and in a file."""

LONGEST_NAME = 60
"""Characters of a cost's or cluster's values that fit a table."""

_UNSET: dict[str, Any] = {
    spec.name: None for spec in fields(Conditions) if spec.default is MISSING
}
NOTHING = Conditions(**_UNSET)
"""What no option was given for."""

Axes = Mapping[str, tuple[Any, ...]]
"""The values of each option that was given, by its name in Features or Conditions."""


def ask(
    names: Sequence[str],
    devices: Sequence[int],
    micro_batches: Sequence[int],
    axes: Axes,
    shape: Shape,
    *,
    printed: bool,
) -> list[Point]:
    """The points of every combination.

    Raises:
        ParameterError: as `grid`, or more than the command line takes on.
    """
    largest = max(devices) * max(micro_batches)
    if largest > MAX_CELLS:
        raise ParameterError(
            f"{max(devices):,} devices × {max(micro_batches):,} micro-batches exceed "
            f"{MAX_CELLS:,}, the most that the command line generates"
        )
    conditions = {spec.name for spec in fields(Conditions)}
    of_cost = {spec.name for spec in fields(Cost)} & conditions
    of_cluster = conditions - of_cost - {*LOWERING, "unit"}
    rename = {"remat": "recompute", "backward_order": "backward"}
    base = _base(axes)
    chosen: dict[str, Any] = {
        "costs": _costs(_named(axes, of_cost, base), shape, axes),
        "clusters": {
            name: cluster_of(conditions)
            for name, conditions in _named(axes, of_cluster, base).items()
        },
        **{
            rename.get(name, name): values
            for name, values in axes.items()
            if name not in {*of_cost, *of_cluster, "unit"}
        },
    }
    most = MAX_PRINTED if printed else MAX_KEPT
    sizes = [len(names), len(devices), len(micro_batches), *map(len, chosen.values())]
    if (count := math.prod(sizes)) > most:
        raise ParameterError(
            f"{count:,} points exceed {most:,}: sweep in parts"
            + (", or into a file with -o" if printed else "")
        )
    return grid(names, devices, micro_batches, **chosen)


def _base(axes: Axes) -> Conditions:
    """The unit of time, which all share."""
    units = axes.get("unit", (NOTHING.unit,))
    if len(set(units)) > 1:
        raise ParameterError(
            f"--unit is of the whole sweep: give it once, got {', '.join(units)}"
        )
    return replace(NOTHING, unit=units[0])


def _costs(
    named: dict[str, Conditions], shape: Shape, axes: Axes
) -> dict[str, Cost | Callable[[Schedule], Cost]]:
    given = {
        spec.name: value
        for spec in fields(shape)
        if (value := getattr(shape, spec.name)) is not None
    }
    if not given:
        return {name: cost_of(conditions) for name, conditions in named.items()}
    # Whether the times must be seconds depends on there being a named cluster.
    cluster = axes.get("cluster", (None,))[0]
    model = _name_of(given, 1)
    result: dict[str, Cost | Callable[[Schedule], Cost]] = {}
    for name, conditions in named.items():
        both = {
            spec.name: getattr(conditions, spec.name) for spec in fields(conditions)
        }
        described = Described(**both | {"cluster": cluster}, shape=shape)
        label = model if name == "default" else f"{model} {name}"
        result[label] = partial(cost_of, described)
    return result


def _named(axes: Axes, members: set[str], base: Conditions) -> dict[str, Conditions]:
    """Every combination of some options, under a name that tells its values."""
    given = {name: values for name, values in axes.items() if name in members}
    result = {}
    for number, values in enumerate(product(*given.values()), start=1):
        chosen = dict(zip(given, values))
        result[_name_of(chosen, number)] = replace(base, **chosen)
    return result


def _name_of(chosen: Mapping[str, Any], number: int) -> str:
    name = " ".join(map(_value, chosen, chosen.values())) or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 6]}… #{number}"


def _value(name: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{name.replace('_', '-')}={text}"


def tabulate(
    points: list[Point], output: str | None, jobs: int | None, *, as_json: bool
) -> None:
    """Simulate every point, and print or keep a row of each."""
    if jobs is None:
        # Starting processes takes longer than this.
        jobs = -1 if sum(point.size for point in points) > LONG else 1
    with _moving() as progress, _resumable(output):
        results = sweep(
            points,
            file=output,
            jobs=jobs,
            progress=progress,
            tell=lambda text: click.echo(f"Note: {text}", err=True),
        )
    if output is not None:
        _tell_of_file(results, output, as_json=as_json)
    elif as_json:
        emit_json({"cells": list(map(_cell, results))})
    else:
        _tell(results)
    found = {result.status for result in results}
    if "broken" in found:
        raise click.exceptions.Exit(1)
    if found == {"refused"}:
        raise click.exceptions.Exit(2)


@contextmanager
def _moving() -> Iterator[Callable[[int, int], None] | None]:
    if not watched():
        yield None
        return
    with bar("simulating") as move:
        yield move


@contextmanager
def _resumable(output: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if output is not None:
            click.echo(
                f"\nWhat was done is kept; the same command goes on with {output}",
                err=True,
            )
        raise


def _tell_of_file(results: list[Result], output: str, *, as_json: bool) -> None:
    counts = {
        status: sum(result.status == status for result in results)
        for status in ("simulated", "refused", "broken")
    }
    if as_json:
        emit_json({"path": output, "points": len(results), **counts})
        return
    words = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    click.echo(f"{output}: {len(results):,} points, {words}", err=True)


def _cell(result: Result) -> dict[str, Any]:
    """A result as `--json` has it: figures as `simulate` names them."""
    cell = result.record() | {"options": dict(result.point.options)}
    reason = cell.pop("reason")
    if reason:
        cell[result.status] = reason
    return {
        name: value
        for name, value in cell.items()
        if not name.startswith("max_") and (value is not None or result.figures)
    }


def _tell(results: list[Result]) -> None:
    """A table, without the columns that say the same in every row."""
    records = [result.record() for result in results]
    varying = [
        name
        for name in ("options", "recompute", *LOWERING, "cost", "cluster")
        if len({record[name] for record in records}) > 1
    ]
    reasons = ["reason"] if any(result.reason for result in results) else []
    numbers = ["bubble_fraction", "max_peak_activations", "makespan"]
    if any(record["max_peak_bytes"] is not None for record in records):
        numbers.append("max_peak_bytes")
    names = ["schedule", "devices", "micro_batches", *varying, *numbers, *reasons]
    short = {
        "devices": "p",
        "micro_batches": "m",
        "max_peak_activations": "peak_activations",
        "max_peak_bytes": "peak_bytes",
    }
    emit_table(
        "peaks: the most on any device; activations in micro-batches of its share",
        [short.get(name, name) for name in names],
        ([_text(name, record[name]) for name in names] for record in records),
        right=[
            short.get(name, name) for name in ("devices", "micro_batches", *numbers)
        ],
    )


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "bubble_fraction":
        return f"{value:.4f}"
    if isinstance(value, float):
        return shown(int(value) if value.is_integer() else value)
    return str(value)
