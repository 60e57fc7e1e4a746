"""`pipeproof sweep`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, TypeVar

import click

from pipeproof.cli.options import Conditions, Features
from pipeproof.cli.output import emit_json, emit_table, full, shown
from pipeproof.cli.predict import figures, predict
from pipeproof.cli.progress import tracked
from pipeproof.cli.source import make
from pipeproof.sched import CATALOG, ParameterError, PipeproofError, Trace

MAX_CELLS = 10_000

Cell = tuple[str, int, int]
T = TypeVar("T")


def tabulate(
    names: Sequence[str],
    devices: Sequence[int],
    micro_batches: Sequence[int],
    features: Features,
    conditions: Conditions,
    *,
    as_json: bool,
) -> None:
    """Simulate every cell and print a row of each."""
    if unknown := [name for name in names if name not in CATALOG]:
        raise ParameterError(
            f"no schedule is called {unknown[0]!r}: the catalogue has "
            f"{', '.join(CATALOG)}"
        )
    cells = list(product(dict.fromkeys(names), devices, micro_batches))
    if len(cells) > MAX_CELLS:
        raise ParameterError(
            f"{len(cells):,} cells exceed {MAX_CELLS:,}: sweep in parts"
        )
    entries = list(_entries(tracked(cells, "simulating"), features, conditions))
    if as_json:
        emit_json({"cells": entries})
    else:
        _tell(entries)
    if all("refused" in entry for entry in entries):
        raise click.exceptions.Exit(2)


def _tell(entries: list[dict[str, Any]]) -> None:
    columns = ["schedule", "p", "m", "bubble_fraction", "peak_activations", "makespan"]
    refusals = any("refused" in entry for entry in entries)
    emit_table(
        "peak_activations: the most on any device, in micro-batches of its share",
        [*columns, "refused because"] if refusals else columns,
        (_row(entry)[: len(columns) + refusals] for entry in entries),
        right=columns[1:],
    )


def _entries(
    cells: Iterable[Cell], features: Features, conditions: Conditions
) -> Iterator[dict[str, Any]]:
    for name, p, m in cells:
        try:
            trace: Trace = predict(make(name, p, m, features), conditions)
            yield figures(trace)
        except PipeproofError as error:
            yield {
                "schedule": name,
                "devices": p,
                "micro_batches": m,
                "refused": str(error),
            }


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    head = (entry["schedule"], str(entry["devices"]), str(entry["micro_batches"]))
    if "refused" in entry:
        return (*head, "", "", "", entry["refused"])
    return (
        *head,
        f"{entry['bubble_fraction']:.4f}",
        shown(full(max(entry["peak_activations"]))),
        shown(entry["makespan"]),
        "",
    )
